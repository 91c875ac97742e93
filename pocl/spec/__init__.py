"""What a distillation job is: the specification that clients post and the engine runs.

A specification is immutable, and unknown fields are refused: a typo never trains. :func:`resolve` lays a client's
fields over a preset and returns a specification that names every value; that is what is stored, returned and run.
"""

from pocl.spec.curriculum import (
    CONTROL_KINDS,
    Advance,
    AllSamples,
    ByConvergence,
    ByEpochs,
    ConstantTemperature,
    ConstantWeight,
    Control,
    Curriculum,
    NoCurriculum,
    Range,
    Ranking,
    ReversedOrder,
    ShuffledStages,
    TemperatureRange,
    WeightRange,
)
from pocl.spec.data import Data, DataRef, DataSplit
from pocl.spec.distillation import ENGINE_CHOICES, DistillationSpec, PresetName
from pocl.spec.frozen import FrozenModel
from pocl.spec.methods import (
    JS,
    METHODS,
    SFT,
    TVD,
    AdaptiveKL,
    AlphaBeta,
    DistillationMethod,
    ForwardKL,
    KDMethod,
    Method,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    describe_method,
)
from pocl.spec.models import HubModel, LayersOfTeacher, ModelRef, RandomModel, StudentRef
from pocl.spec.presets import PRESETS, field_errors, resolve
from pocl.spec.training import Checkpoints, Evaluation, Resources, Sampling, Training

__all__ = [
    "CONTROL_KINDS",
    "ENGINE_CHOICES",
    "JS",
    "METHODS",
    "PRESETS",
    "SFT",
    "TVD",
    "AdaptiveKL",
    "Advance",
    "AllSamples",
    "AlphaBeta",
    "ByConvergence",
    "ByEpochs",
    "Checkpoints",
    "ConstantTemperature",
    "ConstantWeight",
    "Control",
    "Curriculum",
    "Data",
    "DataRef",
    "DataSplit",
    "DistillationMethod",
    "DistillationSpec",
    "Evaluation",
    "ForwardKL",
    "FrozenModel",
    "HubModel",
    "KDMethod",
    "LayersOfTeacher",
    "Method",
    "ModelRef",
    "NoCurriculum",
    "PresetName",
    "RandomModel",
    "Range",
    "Ranking",
    "Resources",
    "ReverseKL",
    "ReversedOrder",
    "Sampling",
    "ShuffledStages",
    "SkewForwardKL",
    "SkewReverseKL",
    "StudentRef",
    "TemperatureRange",
    "Training",
    "WeightRange",
    "describe_method",
    "field_errors",
    "resolve",
]
