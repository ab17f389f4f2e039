import pytest
import torch

from .tiny_stage import Colours, tiny_config, word_tokenizer, write_conversations


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def colours():
    return Colours()


@pytest.fixture
def tiny(tmp_path):
    """`tiny(recipe, **overrides)`: a tiny config whose output goes to a temporary folder."""
    return lambda recipe, **overrides: tiny_config(
        recipe, **({"output_dir": tmp_path / recipe.lower()} | overrides)
    )


@pytest.fixture
def conversations(tmp_path):
    """`conversations(number)`: path of a LLaVA file of that many good records."""
    return lambda number: write_conversations(tmp_path / "data", number)
