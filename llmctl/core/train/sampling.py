"""Sample texts from a model in training, through the one generate loop. Knows the engine; knows no training loop."""

from collections.abc import Callable

from llmctl.core.errors import InputError
from llmctl.core.infer.engine import Engine
from llmctl.core.infer.events import Failed, Finished, Request
from llmctl.core.infer.sampler import SamplingParams
from llmctl.core.infer.torch_executor import TorchExecutor
from llmctl.core.model import Decoder
from llmctl.core.tokenizer import Tokenizer

_PARAMS = SamplingParams(temperature=0.8, top_p=0.95)


def sampler(
    tokenizer: Tokenizer, *, prompt: str, max_new_tokens: int, seed: int, documents: bool
) -> Callable[[Decoder, int], tuple[str, str]]:
    """A function of (model, step) that gives (prompt, prompt and what the model wrote after it).

    An empty prompt begins with the token that stands between documents, or, where the data is not made of `documents` and
    that token was hardly ever seen, with a newline. The uniforms are keyed by `seed` alone, so the
    texts of successive steps differ by what was learnt, and no generator of the training is touched. The function raises
    InputError when the tokenizer leaves nothing to begin with or the prompt does not fit the model's context.
    """
    prompt_ids = tokenizer.encode(prompt)
    if not prompt_ids:
        start = tokenizer.eos_id if documents else None
        prompt_ids = [start] if start is not None else tokenizer.encode("\n")
    eos_ids = () if tokenizer.eos_id is None else (tokenizer.eos_id,)

    def draw(model: Decoder, step: int) -> tuple[str, str]:
        room = model.config.max_positions - len(prompt_ids)
        request = Request(
            id="sample", prompt_ids=tuple(prompt_ids), max_new_tokens=max(1, min(max_new_tokens, room)), params=_PARAMS, seed=seed
        )
        was_training = model.training
        try:
            for event in Engine(TorchExecutor(model, decode="eager"), tokenizer, eos_ids=eos_ids).run([request]):
                if isinstance(event, Finished):
                    return prompt, prompt + event.text
                if isinstance(event, Failed):
                    raise InputError(f"--sample-prompt: {event.error}")
        finally:
            model.train(was_training)
        raise InputError("the engine gave no text")

    return draw
