"""The ranks and the tiny checkpoints that the distributed tests share."""

import pytest
from support import qwen3_folder
from support.qwen3_folder import MOE
from support.rank_pool import RankPool

STUDENT = {"num_hidden_layers": 4, "vocab_size": 37}
"""37 columns leave one to pad at TP 2."""
EXPERTS = ("experts", "loose")
TEACHER = {"num_hidden_layers": 2, "vocab_size": 41, "hidden_size": 32, "intermediate_size": 56}
"""Another shape, and tokens that the student doesn't have."""


@pytest.fixture(scope="session")
def ranks() -> RankPool:
    """Return what runs functions on ranks, with Megatron and the package in memory.

    A session has one fork server, so that this loads what the end-to-end tests' ranks need, too.
    """
    return RankPool(
        preload=["training", "poweropd_megatron.train.build", "poweropd_megatron.cli.main"]
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the folders of student and teacher, each tied, untied and with experts (tied), whose
    weights sum to 1 or, as "loose", don't."""
    root = tmp_path_factory.mktemp("models")
    folders = {}
    for model, seed, changes in (("student", 0, STUDENT), ("teacher", 3, TEACHER)):
        for kind in ("tied", "untied", "experts", "loose"):
            folder = root / f"{model}-{kind}"
            experts = MOE | {"norm_topk_prob": kind == "experts"} if kind in EXPERTS else {}
            qwen3_folder.write(
                folder,
                seed=seed,
                tie_word_embeddings=kind != "untied",
                **(changes | experts),
            )
            folders[folder.name] = str(folder)
    same_tokens = {**TEACHER, "vocab_size": STUDENT["vocab_size"]}
    qwen3_folder.write(root / "teacher-same-tokens", seed=4, **same_tokens)
    folders["teacher-same-tokens"] = str(root / "teacher-same-tokens")
    return folders
