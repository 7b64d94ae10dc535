"""csrc/src/rows/bindings.cpp. Addresses are of tensors' first elements, 0 for none; see rows.hpp."""

class Divergence:
    None_: Divergence
    ForwardKL: Divergence
    ReverseKL: Divergence
    JSD: Divergence
    SkewedForwardKL: Divergence
    SkewedReverseKL: Divergence
    TVD: Divergence
    Jeffreys: Divergence

class Options:
    def __init__(
        self,
        *,
        divergence: Divergence,
        parameter: float,
        temperature: float,
        kd_weight: float,
        ce_weight: float,
        logit_scale: float,
        softcap: float,
        num_compared: int,
        tile_columns: int,
        form_gradients: bool,
    ) -> None: ...

class Logits:
    def __init__(self, *, bfloat16: bool = False, tiles: int = 0, num_tiles: int = 0) -> None: ...

MAX_TILE_COLUMNS: int

def instruction_sets() -> list[str]: ...
def run(
    *,
    options: Options,
    student: Logits,
    first_row: int,
    teacher: Logits,
    num_rows: int,
    labels: int,
    row_scale: int,
    kd: int,
    ce: int,
    student_entropy: int,
    teacher_entropy: int,
    agreement: int,
    num_threads: int,
    instruction_set: str,
) -> None: ...
