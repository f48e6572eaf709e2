"""What a reader of an HTML page sees."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """The page's words, one string per element, in reading order, and its tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.append(" ".join(data.split()))

    def after(self, word: str, count: int) -> list[str]:
        """Return this many strings after the first that is `word`."""
        start = self.words.index(word) + 1
        return self.words[start : start + count]
