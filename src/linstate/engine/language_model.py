"""A language model as a person uses it: read, ask, generate, go on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from linstate.engine.asking import parse_answer, question_prompt
from linstate.engine.chat_template import ChatTemplate, Message, load_chat_template
from linstate.engine.conversation import Conversation
from linstate.engine.generation import Live, Sampling, generate
from linstate.engine.reader import Reader, call
from linstate.engine.tokens import (
    AnyTokenizer,
    encode,
    first_tokens,
    pieces,
    tokenizer_of,
    with_special_tokens,
)
from linstate.engine.world_tokenizer import WorldTokenizer
from linstate.errors import CheckpointError, InputError, StateMismatchError
from linstate.files import replacing, write_atomically
from linstate.models import Decoder
from linstate.models.checkpoint import end_tokens, load_decoder, pth_of, read_settings
from linstate.models.fingerprint import Fingerprint, fingerprint
from linstate.models.hub import MODELS, model_folder
from linstate.models.packed import pack, weights_of
from linstate.ops.native.linear import Format
from linstate.state.state import State

GRID = 256
POCKET = "pocket"


@dataclass(frozen=True)
class Progress:
    """How far a reading has come: characters and tokens of this reading so far."""

    characters: int
    tokens: int


@dataclass(frozen=True)
class Generation:
    """What was generated, and the state behind it."""

    text: str
    ids: tuple[int, ...]
    state: State


class LanguageModel:
    """A decoder with its tokenizer.

    >>> model = LanguageModel.from_pretrained("pocket")
    >>> state = model.read("colour: green\\nplanet: Mars\\n")
    >>> state.position > 0, state.nbytes == model.read("").nbytes
    (True, True)
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: AnyTokenizer,
        *,
        name: str,
        end: int | Sequence[int] | None = None,
        chat_template: ChatTemplate | None = None,
        grid: int = GRID,
    ) -> None:
        self.decoder = decoder.eval()
        self.tokenizer, self.name, self.grid, self.chat_template = tokenizer, name, grid, chat_template
        self.ends = () if end is None else (end,) if isinstance(end, int) else tuple(end)
        """The tokens at which a generation ends."""
        self.variant = ""
        """How the weights were loaded, where a person chose: what states of it are called by, too."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = POCKET,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        weights: Format | None = None,
    ) -> LanguageModel:
        """Load a model from a folder, of ours or of a family in ``models/families`` (``linstate models`` lists them).

        A folder holds ``config.json``, ``tokenizer.json`` and the weights as safetensors, in one file or several. The authors'
        own ``.pth`` of RWKV-6 and RWKV-7 is read, too, with their ``rwkv_vocab_*.txt`` (or a ``tokenizer.json``) beside it.

        Args:
            path: the folder or ``.pth``; a name on the Hugging Face Hub (``owner/name``, extra ``hf``); or ``"pocket"`` for the
                model that comes with Linstate.
            device: where it runs. dtype: of the weights in memory; float32 on a CPU, else as they are stored.
            revision: branch, tag or commit on the Hub.
            weights: "bf16", "int8" or "int4": pack the weights for this CPU (``models/packed.py``), which is what makes it
                fast; with ``dtype=torch.bfloat16`` most so. None leaves them as they are.

        Raises:
            CheckpointError: a file is missing or broken, names, shapes and configuration do not fit, the model's type is
                unknown, its weights are quantised, or the Hub cannot be reached.
            ConfigError: the configuration asks for something that we do not do, by name.
        """
        if str(path) == POCKET:
            with resources.as_file(resources.files("linstate") / "pocket") as folder:
                made = cls._load(folder, POCKET, device, dtype)
        else:
            folder = model_folder(str(path), revision)
            made = cls._load(folder, Path(path).resolve().name, device, dtype)
        if weights is not None:
            pack(made.decoder, weights)
        chosen = (weights, None if dtype is None else str(dtype).removeprefix("torch."))
        made.variant = ", ".join(word for word in chosen if word is not None)
        return made

    @classmethod
    def _load(cls, folder: Path, name: str, device: str, dtype: torch.dtype | None) -> LanguageModel:
        source, folder = folder, folder if folder.is_dir() else folder.parent
        if pth_of(source) is None:
            if not source.is_dir():
                raise CheckpointError(f"{source} is no model; {MODELS}")
            if not (folder / "config.json").is_file():
                raise CheckpointError(f"the model folder {folder} has no config.json")
        raw = read_settings(source)
        tokenizer = tokenizer_of(folder)
        template = load_chat_template(folder)
        decoder = load_decoder(source, raw, device=device, dtype=dtype)
        if tokenizer.get_vocab_size() > decoder.config.vocab_size:
            raise CheckpointError(
                f"{folder}: the tokenizer has {tokenizer.get_vocab_size()} entries, the model only {decoder.config.vocab_size}"
            )
        return cls(decoder, tokenizer, name=name, end=end_tokens(folder, raw), chat_template=template)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the folder that :meth:`from_pretrained` (and Hugging Face's, with the extra ``hf``) reads."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        tied = self.decoder.config.tie_embeddings
        weights = {
            f"decoder.{name}": t.to(dtype or t.dtype).contiguous()
            for name, t in self.decoder.state_dict().items()
            if not (tied and name == "head.weight")
        }
        config = {
            "model_type": "linstate",
            "architectures": ["LinstateForCausalLM"],
            "architecture": self.decoder.config.to_dict(),
            "eos_token_id": self.ends[0] if len(self.ends) == 1 else list(self.ends) or None,
            "tie_word_embeddings": tied,
        }
        with replacing(target / "model.safetensors") as file:  # tensor by tensor, not as one string of bytes
            safetensors.torch.save_file(weights, file, {"format": "pt"})
        special: dict[str, Any] = {}
        if not isinstance(self.tokenizer, WorldTokenizer):
            end = self.tokenizer.id_to_token(self.ends[0]) if self.ends else None
            special = {"tokenizer_class": "PreTrainedTokenizerFast"}
            special |= {"eos_token": end, "pad_token": end, "clean_up_tokenization_spaces": False}
        if self.chat_template is not None:
            write_atomically(target / "chat_template.jinja", self.chat_template.source.encode())
            special |= self.chat_template.special
        if special:
            write_atomically(target / "tokenizer_config.json", json.dumps(special, indent=1).encode())
        world = isinstance(self.tokenizer, WorldTokenizer)
        file = target / ("rwkv_vocab.txt" if world else "tokenizer.json")
        write_atomically(file, self.tokenizer.to_str(pretty=False).encode())
        write_atomically(target / "config.json", json.dumps(config, indent=1).encode())

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """What a state of this model is bound to."""
        return fingerprint(self.decoder.config, weights_of(self.decoder), self.tokenizer.to_str(pretty=False))

    def empty_state(self, *, keep_tokens: bool = False) -> State:
        """The state of a model that has read nothing; with ``keep_tokens`` it will keep all ids that it reads."""
        return State(
            tensors=self.decoder.init_state(1),
            model=self.fingerprint,
            model_name=f"{self.name} ({self.variant})" if self.variant else self.name,
            layers=self.decoder.config.applied,
            grid=self.grid,
            tokens=() if keep_tokens else None,
        )

    def load_state(self, path: str | Path, *, key: bytes | None = None) -> State:
        """Load a state file of this model. Raises StateFileError, StateMismatchError."""
        return self.accept(
            State.load(path, model=self.fingerprint, key=key, table=self.decoder.state_table), str(path)
        )

    def accept(self, state: State, name: str) -> State:
        """A state from outside, on this model's device, once everything in it is this model's: names, shapes and ranges of
        tensors (:class:`linstate.models.state_table.StateTable`), layers, token ids.

        What grows with the text (a KV cache: no tokens in the empty state) may have any length.

        Raises:
            StateMismatchError: a tensor is missing, unknown, of another shape or dtype, or out of its range.
        """
        self.decoder.state_table.check(state.tensors, name)
        config = self.decoder.config
        most = max((*state.tail, *(state.tokens or ())), default=0)
        if state.layers != config.applied or most >= config.vocab_size:
            raise StateMismatchError(
                f"{name}: its layers or token ids are none of this model's; it is damaged"
            )
        device = self.decoder.embedding.weight.device
        return replace(state, tensors={name: t.to(device) for name, t in state.tensors.items()})

    def _own(self, state: State | None) -> State:
        if state is None:
            return self.empty_state()
        if differ := state.model.differences(self.fingerprint):
            raise StateMismatchError(
                f"the state belongs to the model {state.model_name!r}, whose {' and '.join(differ)} differ from this one's"
            )
        return state

    def reader(
        self, state: State | None = None, *, on_block: Callable[[Reader], None] | None = None
    ) -> Reader:
        """A reader that goes on from ``state``, for those who feed token ids themselves.

        Args:
            on_block: called after each grid block, to keep checkpoints (:class:`Checkpointer`).
        """
        return Reader(self.decoder, self._own(state), on_block)

    def text_reader(self, state: State | None = None) -> Reader:
        """A reader that goes on from ``state``; at the begin of all text it has read the tokens that begin one."""
        reader = self.reader(state)
        if reader.position == 0:
            reader.feed(self.first_tokens)
        return reader

    @cached_property
    def first_tokens(self) -> tuple[int, ...]:
        """What the tokenizer puts before every text."""
        return first_tokens(self.tokenizer)

    def encode(self, text: str, reader: Reader) -> list[int]:
        """The token ids of a text that ``reader`` is to read next."""
        return encode(self.tokenizer, text, goes_on=reader.position > len(self.first_tokens))

    def read(
        self,
        text: str | Iterable[str],
        state: State | None = None,
        *,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> State:
        """Read a text, or the parts that it comes in, from ``state`` on, in constant memory; returns the state after.

        Args:
            on_progress: called after every few thousand characters.
        """
        reader = self.text_reader(state)
        start, characters = reader.position, 0
        for piece in pieces(text):
            ids = self.encode(piece, reader)
            for at in range(0, len(ids), 16 * self.grid):
                part = ids[at : at + 16 * self.grid]
                reader.feed(part)
                if on_progress is not None:
                    done = characters + len(piece) * (at + len(part)) // len(ids)
                    on_progress(Progress(done, reader.position - start))
            characters += len(piece)
        return reader.state()

    def append(self, ids: Iterable[int], state: State | None = None) -> State:
        """Read token ids from ``state`` on."""
        reader = self.reader(state)
        reader.feed(ids)
        return reader.state()

    def settle(self, state: State) -> State:
        """Run the tail too, so that the state can be composed; the grid starts anew behind it."""
        state = self._own(state)
        tensors = state.tensors
        if state.tail:
            _, tensors = call(self.decoder, list(state.tail), tensors, "none")
        return replace(
            state,
            tensors=tensors,
            tail=(),
            calls=(),
            origin=state.position,
            lineage=(*state.lineage, state.id),
        )

    def stream(
        self,
        state: State,
        *,
        max_tokens: int = 200,
        sampling: Sampling | None = None,
        stop: tuple[str, ...] = (),
    ) -> Iterator[Generation]:
        """Generate from ``state`` on; yields after each token what there is so far.

        Ends at the end token, at ``max_tokens``, or when the text holds one of ``stop`` (which is cut off the text; its
        tokens stay in the state).
        """
        ids: list[int] = []
        for token, after in generate(
            self.decoder, self._own(state), sampling or Sampling(), self.ends, max_tokens
        ):
            ids.append(token)
            text = self.tokenizer.decode(ids, skip_special_tokens=False)
            cuts = [text.index(mark) for mark in stop if mark in text]
            yield Generation(text[: min(cuts)] if cuts else text, tuple(ids), after)
            if cuts:
                return

    def generate(
        self,
        prompt: str = "",
        state: State | None = None,
        *,
        max_tokens: int = 200,
        sampling: Sampling | None = None,
        stop: tuple[str, ...] = (),
    ) -> Generation:
        """Read ``prompt`` from ``state`` on, then generate. Raises InputError when there is nothing to go on from."""
        start = self.read(prompt, state)
        last = Generation("", (), start)
        for step in self.stream(start, max_tokens=max_tokens, sampling=sampling, stop=stop):
            last = step
        return last

    def ask(self, question: str, state: State, *, max_tokens: int = 48) -> str:
        """The answer to a question about what ``state`` has read; the state itself stays as it is.

        A model with a chat template is asked as its makers wrote: the question is a message of the user.
        """
        if self.chat_template is not None:
            start, text = Conversation(state).ask(self, question), ""
            for step in self.stream(start.state, max_tokens=max_tokens):
                text = step.text
            return text.strip()
        made = self.generate(question_prompt(question), state, max_tokens=max_tokens, stop=("\n",))
        return parse_answer(made.text)

    def chat_prompt(self, messages: Sequence[Message], *, answer: bool = True, **options: Any) -> str:
        """A conversation as the text that the model was taught to read.

        Args:
            messages: ``[{"role": "user", "content": "..."}, ...]``.
            answer: end where the model's answer begins. options: what else the template knows.

        Raises:
            InputError: the model has no chat template, or its template refuses these messages.
        """
        if self.chat_template is None:
            raise InputError(
                f"the model {self.name} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)"
            )
        return self.chat_template.render(messages, answer=answer, **options)

    def chat_tokens(self, messages: Sequence[Message], *, answer: bool = True, **options: Any) -> list[int]:
        """The token ids of :meth:`chat_prompt`; special tokens in it are special, as everywhere in chats."""
        text = self.chat_prompt(messages, answer=answer, **options)
        return encode(self._special_tokenizer, text)

    @cached_property
    def _special_tokenizer(self) -> AnyTokenizer:
        """The tokenizer, to which a special token's text is that token."""
        return with_special_tokens(self.tokenizer)

    def bits(self, text: str) -> float:
        """Bits that the model needs for a text, read from nothing; its first token costs log2(vocabulary), where none begins all texts."""
        previous = None
        tensors, total = self.empty_state().tensors, 0.0
        if self.first_tokens:
            logits, tensors = call(self.decoder, list(self.first_tokens), tensors, "last")
            previous = logits[0, -1].double().log_softmax(-1)
        else:
            total = math.log2(self.decoder.config.vocab_size)
        for number, piece in enumerate(pieces(text)):
            ids = encode(self.tokenizer, piece, goes_on=number > 0)
            for at in range(0, len(ids), self.grid):
                block = ids[at : at + self.grid]
                logits, tensors = call(self.decoder, block, tensors, "all")
                chosen = logits[0].double().log_softmax(-1)  # [n, vocab]
                if previous is not None:
                    total -= float(previous[block[0]]) / math.log(2)
                rest = torch.tensor(block[1:], dtype=torch.int64, device=chosen.device)
                total -= float(chosen[:-1].gather(1, rest[:, None]).sum()) / math.log(2)
                previous = chosen[-1]
        return total

    def live(self, state: State) -> Live:
        """The live end of a state, for those who choose tokens themselves."""
        return Live(self.decoder, self._own(state))

    def info(self) -> dict[str, Any]:
        """What there is to say about the model, JSON-able."""
        config = self.decoder.config
        return {
            "name": self.name,
            "parameters": self.decoder.parameter_count(),
            "layers": list(config.layers),
            "d_model": config.d_model,
            "vocab_size": config.vocab_size,
            "state_bytes": self.decoder.state_bytes(1),
            "flops_per_token": self.decoder.flops(1),
            "fingerprint": vars(self.fingerprint),
        }
