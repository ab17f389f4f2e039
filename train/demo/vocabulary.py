"""The demonstration's word-level tokenizer: some forty words and the ten digits, one token each."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from train.data.painting import COLOUR_NAMES

from .painted import DIGITS, NUMBER_WORDS

SPECIAL_TOKENS = ("<pad>", "<bos>", "<image>", "<|endofchunk|>")
"""Their ids are 0..3, as the `tiny` preset of the model has them."""

WORDS = (
    *("which", "what", "how", "many", "characters", "colour", "are", "at", "the", "?", ".", "text"),
    *("left", "right", "top", "bottom"),
    *NUMBER_WORDS,
    *DIGITS,
    *COLOUR_NAMES,
)


def build_tokenizer(words: tuple[str, ...] = WORDS) -> PreTrainedTokenizerFast:
    """Splits at white space. A word it does not know raises: there is no unknown token to hide it."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL_TOKENS, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<|endofchunk|>",
        additional_special_tokens=["<image>"],
    )
