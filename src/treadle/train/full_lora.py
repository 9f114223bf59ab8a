"""The baseline that trains A as well as B. Nothing else in treadle moves A: what it makes leaves the family."""

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from treadle.family.injection import trainable
from treadle.family.plan import LayerShape


@contextlib.contextmanager
def full_lora_baseline(
    model: nn.Module, lora_A: Mapping[str, Tensor], shapes: Mapping[str, LayerShape]
) -> Iterator[dict[str, nn.Parameter]]:
    """Yield "MODULE/A", a copy of lora_A, and "MODULE/B", zero, both trainable and injected until the block ends.

    What is yielded goes where `private_steps` takes its weights. The noise on A and on B multiply each other in the
    update, which is why A is frozen elsewhere: arXiv 2403.12313 §3.
    """
    device = next(model.parameters()).device
    moving_A = {name: nn.Parameter(lora_A[name].to(device).clone()) for name in shapes}
    with trainable(model, moving_A, shapes) as lora_B:
        yield {f"{name}/A": A for name, A in moving_A.items()} | {f"{name}/B": B for name, B in lora_B.items()}
