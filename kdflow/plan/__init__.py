"""What a run needs and how long it takes, on paper: from the models' configs and a machine's rates."""

from kdflow.plan.plan import Plan, make_plan
from kdflow.plan.rates import GPUS, Rates, load_rates

__all__ = ["GPUS", "Plan", "Rates", "load_rates", "make_plan"]
