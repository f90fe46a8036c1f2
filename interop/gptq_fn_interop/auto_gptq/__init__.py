"""AutoGPTQ's API, served by gptq_fn: a script that was written for it runs with its import changed.

It translates and computes nothing: models are transformers', the solver, the format and the kernels are gptq_fn's.
"""

from gptq_fn_interop.auto_gptq.config import BaseQuantizeConfig
from gptq_fn_interop.auto_gptq.modeling import AutoGPTQForCausalLM, BaseGPTQForCausalLM
from gptq_fn_interop.quantizer import register

__all__ = ["AutoGPTQForCausalLM", "BaseGPTQForCausalLM", "BaseQuantizeConfig"]

register()
