"""Self-contained HTML pages from the templates beside this file."""

from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from poweropd_megatron.telemetry.svg import DARK, LIGHT


class Figure(NamedTuple):
    """A plot, or the lack of one, with its words."""

    title: str
    caption: str
    svg: str | None
    wide: bool = False
    is_optional: bool = False
    """Left out where there is no plot."""


def render_page(template: str, **values: Any) -> str:
    """Return a page of a template's with these values in their places, escaped."""
    environment = Environment(
        loader=PackageLoader("poweropd_megatron.telemetry"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    values |= {"light": LIGHT, "dark": DARK}
    return environment.get_template(template).render(values) + "\n"
