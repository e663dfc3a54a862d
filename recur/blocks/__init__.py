"""Parts, which own weights, and the layers and models built from them."""

from recur.blocks.attention import Attention, ForgettingAttention, GatedAttention, RelPos, Rotary
from recur.blocks.compound import LogLinearScan, MesaScan, MomentumScan, OjaScan, SlotScan
from recur.blocks.gates import (
    BoundedDecay,
    Complex,
    ComplexGate,
    Decay,
    FixedDecay,
    FlooredDecay,
    KeyedRate,
    Learned,
    LowerBounds,
    OutputGate,
    Phase,
    PowerDecay,
    RealImag,
    RetentionScale,
    Smoothing,
    StepDecay,
)
from recur.blocks.glue import (
    Act,
    Along,
    Dropout,
    LowRank,
    Map,
    Multiply,
    Norm,
    PositionTaps,
    Project,
    Rename,
    Reshape,
    Scale,
    ScaleGrad,
    ShortConv,
    Skip,
    Sum,
    TapConv,
    TokenShift,
    Unbind,
    both_ways,
    down_and_right,
    in_grid,
    in_series,
    one_way,
)
from recur.blocks.hidden import DenseCarry, DenseFusion, DenseRead
from recur.blocks.language_model import Block, LanguageModel
from recur.blocks.leave import join
from recur.blocks.loop import Loop
from recur.blocks.mixer import Mixer, MixerOut
from recur.blocks.scans import DeltaScan, FixedScan, GatedScan, OnlineScan, OuterScan, PoleScan, SelectiveScan, WideScan
from recur.blocks.stabilise import AppendOne, DivideByLast, Stabilise
from recur.blocks.state import detach, nbytes
from recur.blocks.wide import (
    DataDecay,
    DataRotary,
    FeedbackKey,
    Gather,
    Previous,
    RemovalKeys,
    Repeat,
    SelfTerm,
    Spread,
    Trapezoid,
    ValueResidual,
)
from recur.recipe import Chain, Reverse, above

PARTS = (
    Act, Along, AppendOne, Attention, BoundedDecay, Chain, Complex, ComplexGate, DataDecay, DataRotary, Decay,
    DeltaScan, DenseCarry, DenseFusion, DenseRead, DivideByLast, Dropout, FeedbackKey, FixedDecay, FixedScan,
    FlooredDecay, ForgettingAttention, GatedAttention, GatedScan, Gather, KeyedRate, Learned, LogLinearScan,
    Loop, LowerBounds, LowRank, Map, MesaScan, MomentumScan, Multiply, Norm, OjaScan, OnlineScan, OuterScan,
    OutputGate, Phase, PoleScan, PositionTaps, PowerDecay, Previous, Project, RealImag, RelPos, RemovalKeys,
    Rename, Repeat, Reshape, RetentionScale, Reverse, Rotary, Scale, ScaleGrad, SelectiveScan, SelfTerm,
    ShortConv, Skip, SlotScan, Smoothing, Spread, Stabilise, StepDecay, Sum, TapConv, TokenShift, Trapezoid,
    Unbind, ValueResidual, WideScan,
)  # fmt: skip

above.parts |= {part.__name__: part for part in PARTS}
above.join = join

WAYS = (both_ways, down_and_right, in_grid, in_series, one_way)

__all__ = [
    "Block",
    "LanguageModel",
    "Mixer",
    "MixerOut",
    "detach",
    "nbytes",
    *(part.__name__ for part in PARTS),
    *(way.__name__ for way in WAYS),
]
