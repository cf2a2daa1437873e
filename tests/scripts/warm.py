"""Imported by the server of runner.py: what every run would import and compile, once for all."""

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401
import transformers.models.gpt_neox.modeling_gpt_neox  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import ppo  # noqa: F401
import reward  # noqa: F401
import runner  # noqa: F401
import sft  # noqa: F401

get_checkpoint_conversion_mapping("gpt_neox")
