"""Bricks that own weights, and what is built from them."""

from recur.blocks.attention import Attention, GatedAttention, RelPos, Rotary
from recur.blocks.gates import (
    BoundedDecay,
    ComplexGate,
    Decay,
    FixedDecay,
    Learned,
    LowerBounds,
    OutputGate,
    RetentionScale,
    Smoothing,
    StepDecay,
)
from recur.blocks.glue import (
    Act,
    Dropout,
    LowRank,
    Map,
    Norm,
    PositionTaps,
    Project,
    Reshape,
    Reverse,
    Scale,
    ScaleGrad,
    ShortConv,
    Skip,
    Sum,
    TapConv,
    TokenShift,
    Unbind,
    Weigh,
)
from recur.blocks.hidden import DenseFusion
from recur.blocks.language_model import Block, LanguageModel
from recur.blocks.loop import Loop
from recur.blocks.mixer import Mixer, MixerOut, detach, nbytes
from recur.blocks.scans import DeltaScan, FixedScan, GatedScan, OnlineScan, OuterScan, SelectiveScan
from recur.recipe import Chain

PARTS = (
    Act, Attention, BoundedDecay, Chain, ComplexGate, Decay, DeltaScan, DenseFusion, Dropout, FixedDecay, FixedScan,
    GatedAttention, GatedScan, Learned, Loop, LowerBounds, LowRank, Map, Norm, OnlineScan, OuterScan, OutputGate,
    PositionTaps, Project, RelPos, Reshape, RetentionScale, Reverse, Rotary, Scale, ScaleGrad, SelectiveScan,
    ShortConv, Skip, Smoothing, StepDecay, Sum, TapConv, TokenShift, Unbind, Weigh,
)  # fmt: skip

__all__ = ["Block", "LanguageModel", "Mixer", "MixerOut", "detach", "nbytes", *(part.__name__ for part in PARTS)]
