"""Every private torch interface that zerograph uses, in one package.

The tests of capture, effects, shapes, loops and passes were run on torch 2.11, 2.13 and 2.15. What differs:
2.11 cannot trace t5 with a cache, and answers for itself whether it exports. What a later torch renames
is mended here and nowhere else:

    capture.py   torch._dynamo.functional_export: dynamo_graph_capture_for_export, _compiling_state_context
                 torch._dynamo.variables.torch.tracing_state_functions, torch._dynamo.config
                 torch._functorch.aot_autograd.aot_export_joint_with_descriptors, _aot_autograd.descriptors
                 torch._subclasses.fake_tensor.FakeTensorMode
    checkpoint.py  node.meta: ac_graph_id, recompute
    effects.py   torch._dynamo.functional_export.fullgraph_capture and the guards of what it makes
                 torch._dynamo.guards._get_closure_vars
                 torch._dynamo.side_effects.SideEffects: codegen_save_tempvars, _get_modified_vars
    symbols.py   torch._dynamo.maybe_mark_dynamic, TracingContext.tensor_to_context
                 ShapeEnv: guards, var_to_sources, create_symintnode; SymInt.node
                 torch.fx.experimental.symbolic_shapes.free_unbacked_symbols
                 torch.utils._sympy: interp, printers, reference
    runtime.py   torch.distributed.distributed_c10d: _get_default_store, _resolve_process_group
                 ProcessGroup._get_backend(device).options._timeout
                 ctx.maybe_clear_saved_tensors of autograd functions
                 torch._C._autograd._enable_record_function
                 torch.optim.Optimizer: _opt_called, step._wrapped_by_lr_sched, the hook tables
    logs.py      torch._logging._internal: trace_structured, LOG_TRACE_HANDLER
"""

from torch._dynamo.exc import TorchDynamoException as DynamoError
from torch._dynamo.exc import Unsupported
from torch._functorch._aot_autograd.descriptors import (
    GradAOTOutput,
    InputMutationAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from zerograph.compat.capture import (
    Captured,
    capture,
    export_joint,
    new_fake_mode,
    quiet,
    user_frames,
)
from zerograph.compat.checkpoint import checkpoint_call, policy_keeps
from zerograph.compat.effects import Effects, Read, Write, guard_names
from zerograph.compat.logs import trace_text
from zerograph.compat.runtime import (
    clear_saved,
    default_store,
    group_beside,
    group_named,
    has_step_hooks,
    mark_stepped,
    mark_tracked,
    optimizer_hooks,
    timeout_of,
    unrecorded,
)
from zerograph.compat.symbols import (
    SYMBOLIC,
    depends_on_data,
    exact,
    function_of,
    guards_of,
    hint,
    insert_expression,
    mark_dynamic,
    new_size,
    show,
    sizes_of,
    symbol_of,
)

__all__ = [
    "SYMBOLIC",
    "Captured",
    "DynamoError",
    "Effects",
    "FakeTensorMode",
    "GradAOTOutput",
    "InputMutationAOTOutput",
    "PlainAOTInput",
    "PlainAOTOutput",
    "Read",
    "TangentAOTInput",
    "Unsupported",
    "Write",
    "capture",
    "checkpoint_call",
    "clear_saved",
    "default_store",
    "depends_on_data",
    "exact",
    "export_joint",
    "function_of",
    "group_beside",
    "group_named",
    "guard_names",
    "guards_of",
    "has_step_hooks",
    "hint",
    "insert_expression",
    "mark_dynamic",
    "mark_stepped",
    "mark_tracked",
    "new_fake_mode",
    "new_size",
    "optimizer_hooks",
    "policy_keeps",
    "quiet",
    "show",
    "sizes_of",
    "symbol_of",
    "timeout_of",
    "trace_text",
    "unrecorded",
    "user_frames",
]
