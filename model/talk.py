"""`python -m model generate` and `chat`: questions to a saved model, answers as they are made."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer, set_seed

from .checks import require
from .encoded_images import EncodedImages
from .generation import MAX_NEW_TOKENS
from .infimm_hd import InfiMMHD
from .processing import InfiMMHDProcessor

DEMO_MODEL = Path("runs/demo/IFT/model")
"""What `make demo` leaves."""

CHAT_HELP = "/image FILE shows an image with the next question, /reset forgets everything, /quit ends"


def add_parsers(commands: Any) -> None:
    """Adds `generate` and `chat` to the subcommands of `python -m model`."""
    generate = commands.add_parser("generate", help="answer one question about images")
    generate.add_argument("--image", action="append", default=[], metavar="FILE", help="may be repeated")
    generate.add_argument("--prompt", required=True, help="the question; the images stand before it")
    generate.set_defaults(run=_generate)
    chat = commands.add_parser("chat", help="talk with the model about images", epilog=CHAT_HELP)
    chat.set_defaults(run=_chat)
    for parser in (generate, chat):
        parser.add_argument(
            "--model", type=Path, default=DEMO_MODEL, help=f"folder of save_pretrained (default {DEMO_MODEL})"
        )
        parser.add_argument("--system", help="system text, in place of the chat template's own")
        parser.add_argument(
            "--max-new-tokens", type=int, help=f"longest answer (default {MAX_NEW_TOKENS}, or what has room)"
        )
        parser.add_argument(
            "--temperature", type=float, default=0.0, help="above 0: sample (default 0, greedy)"
        )
        parser.add_argument("--top-p", type=float, default=1.0, help="of the sampling (default 1)")
        parser.add_argument("--num-beams", type=int, default=1, help="beam search (default 1: none)")
        parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
        parser.add_argument("--device", help="default: cuda where there is one")
        parser.add_argument(
            "--dtype", default="auto", help="of the weights: auto, float32, bfloat16, float16"
        )


class Conversation:
    """Messages about images with a model; images are encoded once, whatever the number of questions."""

    def __init__(self, model: InfiMMHD, processor: InfiMMHDProcessor, system: str | None = None) -> None:
        self.model, self.processor, self.system = model, processor, system
        self.reset()

    def reset(self) -> None:
        """Forgets messages and images."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.pictures: list[Any] = []
        self._encoded: EncodedImages | None = None

    def ask(
        self, question: str, pictures: list[Any] = (), say: Callable[[str], None] | None = None, **options
    ) -> str:
        """The answer to `question`, before which `pictures` (paths, PIL images, arrays) stand.

        `say` gets the answer in pieces as it is made; `options` go to `generate`. ValueError for a picture
        that cannot be read or a conversation that has outgrown the model, and nothing is remembered."""
        parts = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
        messages = [*self.messages, {"role": "user", "content": parts}]
        shown = [*self.pictures, *pictures]
        inputs = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"images": shown} if shown else None,
        ).to(self.model.device)
        text = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
        encoded = self._encoded if self._encoded is not None and not pictures else self._encode(inputs)
        streamer = None if say is None else _Streamer(self.processor, say)
        tokens = self.model.generate(**text, images=encoded, streamer=streamer, **options)
        answer = self.processor.decode(tokens[0, text["input_ids"].shape[1] :])
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.pictures, self._encoded = shown, encoded
        return answer

    @torch.no_grad()
    def _encode(self, inputs: Any) -> EncodedImages:
        return self.model.encode_images(
            inputs.get("pixel_values"),
            inputs.get("window_positions"),
            inputs["windows_per_image"],
            inputs["images_per_sample"],
        )


class _Streamer(TextStreamer):
    """Hands finished words to `say`, without the end token."""

    def __init__(self, processor: InfiMMHDProcessor, say: Callable[[str], None]) -> None:
        super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.say, self.end_id = say, processor.end_of_chunk_token_id

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt or int(value.flatten()[-1]) != self.end_id:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.say(text)


def load(options: argparse.Namespace) -> Conversation:
    """The model and processor that the command line names."""
    folder, dtypes = options.model, ("auto", "float32", "bfloat16", "float16")
    hint = " (`make demo` leaves one)" if folder == DEMO_MODEL else ""
    rule = f"be a folder with a saved model and processor{hint}"
    require((folder / "config.json").is_file(), "--model", rule, str(folder))
    require(options.dtype in dtypes, "--dtype", f"be one of {', '.join(dtypes)}", options.dtype)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(options.device or default)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be one that works here, got {options.device!r}: {error}") from error
    model = InfiMMHD.from_pretrained(folder, dtype=options.dtype).to(device)
    try:
        processor = InfiMMHDProcessor.from_pretrained(folder)
    except (OSError, TypeError, KeyError) as error:
        raise ValueError(f"--model must hold a saved processor, got {str(folder)!r}: {error}") from error
    return Conversation(model, processor, options.system)


def _generation_options(options: argparse.Namespace) -> dict[str, Any]:
    require(options.temperature >= 0, "--temperature", "be at least 0", options.temperature)
    require(0 < options.top_p <= 1, "--top-p", "lie in (0, 1]", options.top_p)
    require(options.num_beams >= 1, "--num-beams", "be at least 1", options.num_beams)
    set_seed(options.seed)
    found: dict[str, Any] = (
        {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
    )
    if options.temperature > 0:
        found |= dict(do_sample=True, temperature=options.temperature, top_p=options.top_p)
    return found if options.num_beams == 1 else found | dict(num_beams=options.num_beams)


def _say(text: str) -> None:
    print(text, end="", flush=True)


def _generate(options: argparse.Namespace) -> str:
    chosen = _generation_options(options)
    conversation = load(options)
    if options.num_beams > 1:  # an answer is known at the end only
        return conversation.ask(options.prompt, options.image, **chosen)
    conversation.ask(options.prompt, options.image, say=_say, **chosen)
    return ""


def _chat(options: argparse.Namespace) -> str:
    chosen = _generation_options(options)
    conversation = load(options)
    say = _say if options.num_beams == 1 else None
    print(CHAT_HELP)
    pictures: list[str] = []
    while True:
        print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return ""
        command, _, argument = line.strip().partition(" ")
        if command == "/reset":
            conversation.reset()
            pictures = []
        elif command == "/image":
            pictures.append(argument.strip())
        elif command.startswith("/"):
            print(f"unknown command {command!r}: {CHAT_HELP}")
        elif line.strip():
            try:
                answer = conversation.ask(line.strip(), pictures, say=say, **chosen)
                print("" if say is not None else answer)
            except ValueError as error:  # the conversation goes on without this question
                print(f"error: {error}")
            pictures = []
