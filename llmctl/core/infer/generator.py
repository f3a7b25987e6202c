"""A model ready to generate: weights, tokenizer, engine and prompts in one hand. The door for Python programs.

from llmctl.core.infer.generator import Generator

generator = Generator.open("storyteller")
request = generator.request("Once upon a time", max_new_tokens=100, seed=1)
for event in generator.engine.run([request]):
    ...
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmctl.core.errors import InputError
from llmctl.core.infer.constrain import Constrainer, Constraint
from llmctl.core.infer.defaults import merged, recommended
from llmctl.core.infer.engine import Engine, never_stop
from llmctl.core.infer.events import Finished, FinishReason, Request
from llmctl.core.infer.executor import Executor
from llmctl.core.infer.memory import batch_tokens as fitting_tokens
from llmctl.core.infer.opening import ExecutorKind, OpenedModel, open_model
from llmctl.core.infer.prompting import Prompt, Prompter
from llmctl.core.infer.sampler import SamplingParams
from llmctl.core.infer.speculate import PromptLookup, Speculator

if TYPE_CHECKING:
    from llmctl.core.infer.beam import BeamParams, BeamStep
    from llmctl.core.infer.preset import Preset
    from llmctl.core.native.cache import CacheDtype
    from llmctl.core.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Generator:
    """What one model needs to answer requests."""

    executor: Executor
    executor_kind: Literal["native", "torch"]
    engine: Engine
    constrainer: Constrainer
    tokenizer: "Tokenizer"
    prompter: Prompter
    eos_ids: frozenset[int]
    params: SamplingParams
    """The sampling that the preset wants, else the model, else ours."""
    path: Path
    description: str
    """Family, number format, device and executor, for people."""
    adapter: Path | None = None
    """The adapter that is merged into the weights."""
    note: str | None = None
    """What the user should know of how the model runs."""

    @classmethod
    def open(
        cls,
        model: str | Path | None,
        *,
        adapter: str | Path | None = None,
        tokenizer: Path | None = None,
        chat_template: str | None = None,
        device: str = "auto",
        dtype: str | None = None,
        quant: Literal["int8", "int4"] | None = None,
        threads: int | None = None,
        executor: ExecutorKind = "auto",
        num_slots: int = 1,
        chat: bool | None = None,
        system: str | None = None,
        allow_special: bool = False,
        truncate: Literal["left", "right"] | None = None,
        preset: "Preset | None" = None,
        speculate: Literal["auto", "off"] | int = "auto",
        draft_model: str | Path | None = None,
        batch_tokens: Literal["auto"] | int = "auto",
        kv_dtype: "CacheDtype | None" = None,
        cuda_graphs: bool = True,
    ) -> "Generator":
        """Load a model (directory, .gguf file, hub id or built-in name). Raises NotFoundError, InputError, UsageError.

        `adapter`, a directory or a hub id, is merged into it; `model` may be None then (an adapter names its base), or be
        the adapter itself. Without either it is the built-in model. `speculate` says how many tokens to guess ahead: "auto"
        as many as pay, on an executor whose results do not depend on how tokens are cut into calls, or with a
        `draft_model`; a number always so many. `num_slots` texts are under way at most, of `batch_tokens` tokens in all; "auto"
        is what free memory has room for. Without `cuda_graphs` a CUDA GPU is given each kernel by itself.
        """
        from llmctl.core.checkpoint import check_tokenizer, load_tokenizer, resolve_adapted

        path, folder = resolve_adapted(None if model is None else str(model), None if adapter is None else str(adapter))
        words = load_tokenizer(path if tokenizer is None else tokenizer, adapter=folder if tokenizer is None else None, quickly=True)
        if chat_template is not None:
            words.chat_template = chat_template
        machine: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "quant": quant,
            "threads": threads,
            "executor": executor,
            "cuda_graphs": cuda_graphs,
        }
        loaded = open_model(path, adapter=folder, kv_dtype=kv_dtype, **machine)
        check_tokenizer(words, loaded.config, where=path if tokenizer is None else tokenizer)
        prompter = Prompter(
            words,
            context=loaded.config.max_positions,
            chat=chat,
            system=system,
            allow_special=allow_special,
            truncate=truncate,
            preset=preset,
        )
        draft = None if draft_model is None or speculate == "off" else _open_draft(str(draft_model), words, machine)
        eos_ids = set(loaded.eos_ids)
        if not eos_ids and words.eos_id is not None:
            eos_ids.add(words.eos_id)
        if prompter.uses_chat:  # many chat models name only the end of text, not the end of a turn
            eos_ids |= words.end_of_turn_ids
        num_tokens = fitting_tokens(loaded.cache_token_bytes, loaded.device) if batch_tokens == "auto" else batch_tokens
        num_choices = min(loaded.executor.vocab_size, words.vocab_size)
        constrainer = Constrainer(words.to_json, num_choices=num_choices, eos_ids=eos_ids)
        return cls(
            executor=loaded.executor,
            executor_kind=loaded.kind,
            engine=Engine(
                loaded.executor,
                words,
                eos_ids=eos_ids,
                num_slots=num_slots,
                batch_tokens=num_tokens,
                speculator=_speculator(loaded, draft, speculate, num_choices=num_choices),
                constrainer=constrainer,
            ),
            constrainer=constrainer,
            tokenizer=words,
            prompter=prompter,
            eos_ids=frozenset(eos_ids),
            params=merged(recommended(loaded.generation), {} if preset is None else preset.sampling),
            path=path,
            adapter=folder,
            description=f"{path.name}{'' if folder is None else f' with {folder.name}'}: {loaded.description}",
            note=loaded.note,
        )

    def request(
        self,
        text: str,
        *,
        id: int | str = 1,
        sample_index: int = 0,
        seed: int = 0,
        max_new_tokens: int | None = None,
        stop: tuple[str, ...] = (),
        **sampling: Any,
    ) -> Request:
        """A request for the engine; `sampling` replaces what the model recommends. Raises InputError, UsageError."""
        prompt = self.prompter.from_text(text, max_new_tokens=max_new_tokens)
        return self.request_for(prompt, id=id, sample_index=sample_index, seed=seed, stop=stop, params=merged(self.params, sampling))

    @staticmethod
    def request_for(
        prompt: Prompt,
        *,
        id: int | str,
        sample_index: int,
        seed: int,
        stop: tuple[str, ...],
        params: SamplingParams,
        num_logprobs: int | None = None,
        ignore_eos: bool = False,
        min_new_tokens: int = 0,
        constraint: Constraint | None = None,
    ) -> Request:
        """A request from a prompt that is ready."""
        return Request(
            id=id,
            sample_index=sample_index,
            prompt_ids=prompt.ids,
            max_new_tokens=prompt.max_new_tokens,
            params=params,
            seed=seed,
            stop=stop,
            num_logprobs=num_logprobs,
            ignore_eos=ignore_eos,
            min_new_tokens=min_new_tokens,
            constraint=constraint,
        )

    def search(
        self, prompt: Prompt, params: "BeamParams", *, num_texts: int = 1, stop: Callable[[], int | None] = never_stop
    ) -> "Iterator[BeamStep | Finished]":
        """Beam search: a BeamStep for each token, then the `num_texts` best texts."""
        from llmctl.core.infer.beam import BeamStep, beam_search

        steps = beam_search(
            self.executor,
            prompt.ids,
            params,
            max_new_tokens=prompt.max_new_tokens,
            eos_ids=self.eos_ids,
            num_choices=min(self.executor.vocab_size, self.tokenizer.vocab_size),
            stop=stop,
        )
        for step in steps:
            if isinstance(step, BeamStep):
                yield step
                continue
            for index, beam in enumerate(step[:num_texts]):
                reason: FinishReason = "eos" if beam.tokens[-1] in self.eos_ids else "length"
                if stop() is not None and len(beam.tokens) < prompt.max_new_tokens and reason != "eos":
                    reason = "interrupted"
                ids = [token for token in beam.tokens if token not in self.eos_ids]
                yield Finished(
                    id=1,
                    sample_index=index,
                    text=self.tokenizer.decode(ids, skip_special=True),
                    finish=reason,
                    token_ids=beam.tokens,
                    num_prompt_tokens=len(prompt.ids),
                    num_new_tokens=len(beam.tokens),
                    seed=0,
                    score=beam.score,
                )


def _open_draft(model: str, words: "Tokenizer", machine: Any) -> OpenedModel:
    """The draft model. Raises InputError when its tokenizer is another."""
    from llmctl.core.checkpoint import check_tokenizer, load_tokenizer, resolve_model

    path = resolve_model(model)
    own = load_tokenizer(path)
    if own.fingerprint != words.fingerprint:
        raise InputError(
            f"--draft-model {model}: its tokenizer ({own.fingerprint[:12]}) is not the model's ({words.fingerprint[:12]}); "
            "choose a smaller model of the same family"
        )
    opened = open_model(path, **machine)
    check_tokenizer(own, opened.config, where=path)
    return opened


def _speculator(
    target: OpenedModel, draft: OpenedModel | None, speculate: Literal["auto", "off"] | int, *, num_choices: int
) -> Speculator | None:
    """Who guesses tokens, if anyone. On torch by itself nobody does: another shape of a product may round a near tie the other way."""
    if speculate == "off" or (speculate == "auto" and draft is None and target.kind != "native"):
        return None
    num_tokens = None if speculate == "auto" else speculate
    if draft is None:
        return Speculator(PromptLookup(), token_cost=target.token_cost, num_tokens=num_tokens)
    from llmctl.core.infer.draft_model import DraftModel
    from llmctl.core.model.facts import matmul_parameters

    sizes = [matmul_parameters(model.config) for model in (draft, target)]
    drafter = DraftModel(draft.executor, relative_cost=sizes[0] / sizes[1], num_choices=num_choices)
    return Speculator(drafter, token_cost=target.token_cost, num_tokens=num_tokens)
