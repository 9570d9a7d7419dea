"""Test time: score given answers, judge anybody's scores, ask for verdicts, serve votes, calibrate a score token."""

from megatron_laser.errors import TestTimeError
from megatron_laser.evaluation.engine_choice import EngineChoice, open_engine
from megatron_laser.evaluation.model_folder import ModelFolder, load_model_folder
from megatron_laser.testtime.scoring import Scored, Scorer
from megatron_laser.testtime.voting import Choice, choose

__all__ = [
    "Choice",
    "EngineChoice",
    "ModelFolder",
    "Scored",
    "Scorer",
    "TestTimeError",
    "choose",
    "load_model_folder",
    "open_engine",
]
