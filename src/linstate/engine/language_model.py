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
from tokenizers import Tokenizer

from linstate.engine.asking import parse_answer, question_prompt
from linstate.engine.chat_template import ChatTemplate, load_chat_template
from linstate.engine.generation import Live, Sampling, generate
from linstate.engine.reader import Reader, call
from linstate.engine.tokens import encode, load_tokenizer, pieces
from linstate.errors import CheckpointError, StateMismatchError
from linstate.files import write_atomically
from linstate.models import Decoder, hub
from linstate.models.checkpoint import end_tokens, load_decoder, read_json
from linstate.models.fingerprint import Fingerprint, fingerprint
from linstate.state.state import State

GRID = 256
POCKET = "pocket"

_HINTS = {
    "tokenizer.json": "; transformers writes one: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
}


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
        tokenizer: Tokenizer,
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

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = POCKET,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> LanguageModel:
        """Load a model from a folder, of ours or of a family in ``models/families`` (``linstate models`` lists them).

        A folder holds ``config.json``, ``tokenizer.json`` and the weights as safetensors, in one file or several.

        Args:
            path: the folder; a name on the Hugging Face Hub (``owner/name``, extra ``hf``); or ``"pocket"`` for the
                model that comes with Linstate.
            device: where it runs. dtype: of the weights in memory; float32 on a CPU, else as they are stored.
            revision: branch, tag or commit on the Hub.

        Raises:
            CheckpointError: a file is missing or broken, names, shapes and configuration do not fit, the model's type is
                unknown, its weights are quantised, or the Hub cannot be reached.
            ConfigError: the configuration asks for something that we do not do, by name.
        """
        if str(path) == POCKET:
            with resources.as_file(resources.files("linstate") / "pocket") as folder:
                return cls._load(folder, POCKET, device, dtype)
        if not Path(path).exists() and hub.is_hub_id(str(path)):
            return cls._load(hub.download(str(path), revision), str(path).split("/")[1], device, dtype)
        return cls._load(Path(path), Path(path).resolve().name, device, dtype)

    @classmethod
    def _load(cls, folder: Path, name: str, device: str, dtype: torch.dtype | None) -> LanguageModel:
        if not folder.is_dir():
            raise CheckpointError(
                f"there is no model folder {folder}; give a folder, a name on the Hugging Face Hub (owner/name),"
                " or 'pocket' for the model that comes with Linstate"
            )
        for file in ("config.json", "tokenizer.json"):
            if not (folder / file).is_file():
                raise CheckpointError(f"the model folder {folder} has no {file}{_HINTS.get(file, '')}")
        raw = read_json(folder / "config.json")
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        template = load_chat_template(folder)
        decoder = load_decoder(folder, raw, device=device, dtype=dtype)
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
        write_atomically(target / "model.safetensors", safetensors.torch.save(weights, {"format": "pt"}))
        if self.chat_template is not None:
            write_atomically(target / "chat_template.jinja", self.chat_template.source.encode())
            special = json.dumps(self.chat_template.special, indent=1)
            write_atomically(target / "tokenizer_config.json", special.encode())
        write_atomically(target / "tokenizer.json", self.tokenizer.to_str(pretty=False).encode())
        write_atomically(target / "config.json", json.dumps(config, indent=1).encode())

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """What a state of this model is bound to."""
        return fingerprint(
            self.decoder.config, self.decoder.state_dict(), self.tokenizer.to_str(pretty=False)
        )

    def empty_state(self, *, keep_tokens: bool = False) -> State:
        """The state of a model that has read nothing; with ``keep_tokens`` it will keep all ids that it reads."""
        return State(
            tensors=self.decoder.init_state(1),
            model=self.fingerprint,
            model_name=self.name,
            layers=self.decoder.config.applied,
            grid=self.grid,
            tokens=() if keep_tokens else None,
        )

    def load_state(self, path: str | Path, *, key: bytes | None = None) -> State:
        """Load a state file of this model. Raises StateFileError, StateMismatchError."""
        state = State.load(path, model=self.fingerprint, key=key)
        expected = {name: t.shape for name, t in self.decoder.init_state(1, device="meta").items()}
        if state.tensors.keys() != expected.keys():
            raise StateMismatchError(f"{path}: it holds other tensors than the model's state")
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

    def reader(self, state: State | None = None) -> Reader:
        """A reader that goes on from ``state``, for those who feed token ids themselves."""
        return Reader(self.decoder, self._own(state))

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
        reader = self.reader(state)
        start, characters = reader.position, 0
        for piece in pieces(text):
            ids = encode(self.tokenizer, piece)
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
        """The answer to a question about what ``state`` has read; the state itself stays as it is."""
        made = self.generate(question_prompt(question), state, max_tokens=max_tokens, stop=("\n",))
        return parse_answer(made.text)

    def bits(self, text: str) -> float:
        """Bits that the model needs for a text, read from nothing; its first token costs log2(vocabulary)."""
        total, previous = math.log2(self.decoder.config.vocab_size), None
        tensors = self.empty_state().tensors
        for piece in pieces(text):
            ids = encode(self.tokenizer, piece)
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
