"""The trajectory: one small record per step, from which every weight can be rebuilt."""

from mezo_scale.trajectory.log import Trajectory
from mezo_scale.trajectory.record import UNSYNCED, Header, StepRecord

__all__ = ["Header", "StepRecord", "Trajectory", "UNSYNCED"]
