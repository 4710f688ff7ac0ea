"""The rows of `zero_optimization` in the table of what is built."""

from zerograph.config.row import OFF, advises, built, dormant, refused, under

_ZERO = "zero_optimization"
_PLACED = "zero_optimization.offload_"
_SCHEDULED = "communication is scheduled by the graph"
_IN_GRAPH = "parameters are fetched by the graph, without module hooks"

ZERO_ROWS = (
    *built(under(_ZERO, "stage stage3_prefetch_bucket_size stage3_max_live_parameters")),
    *built(under(_ZERO, "stage3_max_reuse_distance overlap_comm")),
    *built(under(_ZERO, "mics_shard_size zero_hpz_partition_size")),
    *built(under(_ZERO, "reduce_bucket_size allgather_bucket_size reduce_scatter")),
    *built(under(_ZERO, "stage3_param_persistence_threshold stage3_model_persistence_threshold")),
    *advises(under(_ZERO, "round_robin_gradients"), _SCHEDULED),
    *advises(
        under(_ZERO, "sub_group_size"),
        "the optimizer updates one bucket after the other, so there is no other group to size",
    ),
    *advises(
        under(_ZERO, "use_multi_rank_bucket_allreduce allgather_partitions"),
        "stage and reduce_scatter alone decide which collectives are used",
    ),
    *advises(
        under(_ZERO, "contiguous_gradients"), "gradients are always written into flat buckets"
    ),
    *advises(
        under(
            _ZERO,
            "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save",
        ),
        "whole weights are gathered when they are asked for",
    ),
    *advises(
        under(
            _ZERO,
            "stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params "
            "stage3_allgather_sequential leaf_module memory_efficient_linear "
            "override_module_apply log_trace_cache_warnings",
        ),
        _IN_GRAPH,
    ),
    *advises(under(_ZERO, "enable_sanity_checks"), "the graph is verified after every pass"),
    *advises(
        under(_ZERO, "cpu_offload_use_pin_memory save_muon_momentum_buffer_in_memory"),
        "nothing is offloaded",
    ),
    *refused(
        f"{_PLACED}param.device {_PLACED}optimizer.device",
        "parameters, gradients and optimizer states stay on the device of the model",
        "set device to 'none' or leave the section out, and use stage 3 over more ranks",
        "none",
    ),
    *dormant(f"{_PLACED}param {_PLACED}optimizer"),
    *refused(
        f"{_ZERO}.cpu_offload {_ZERO}.cpu_offload_param",
        "this deprecated key asks for offload, which is not built under its new name either",
        OFF,
        False,
        None,
    ),
    *refused(
        under(_ZERO, "zenflow zeropp_loco_param"),
        "every gradient is reduced and applied in full",
        "leave it out",
        None,
    ),
    *refused(
        under(
            _ZERO,
            "zero_quantized_weights zero_quantized_nontrainable_weights "
            "zero_quantized_gradients mics_hierarchical_params_gather",
        ),
        "collectives move unquantized shards over all ranks at once",
        OFF,
        False,
    ),
    *refused(
        under(_ZERO, "load_from_fp32_weights"),
        "fp32 master weights are restored from fp32",
        "set it to true or leave it out",
        True,
    ),
    *refused(
        under(_ZERO, "ignore_unused_parameters"),
        "a parameter without a gradient is left as it is",
        "set it to true or leave it out",
        True,
    ),
    *refused(
        under(_ZERO, "elastic_checkpoint legacy_stage1 pipeline_loading_checkpoint"),
        "only the present form of this function exists",
        OFF,
        False,
    ),
)
