"""verify: the invariants that hold after every pass. To break one is a defect, not bad input.

Each check reads the graph alone, is linear in it, and runs from the moment the property that it is
about has been provided. A VerifyError says which invariant, at which node, and after which pass.
"""

from zerograph.errors import VerifyError
from zerograph.ir import TrainGraph
from zerograph.verify import (
    arenas,
    axes,
    brackets,
    collectives,
    copies,
    gradients,
    norms,
    shares,
    step,
    values,
)
from zerograph.verify.common import Check


def verify(graph: TrainGraph, provided: frozenset[str], after: str) -> None:
    """Raise VerifyError if an invariant that holds once `provided` is broken."""
    for needs, check in CHECKS:
        if needs <= provided:
            for problem in check(graph):
                raise VerifyError(f"after pass {after}: {problem}")


_HAS = frozenset
CHECKS: tuple[tuple[frozenset[str], Check], ...] = (
    (_HAS(), values.regions_in_order),
    (_HAS(), values.values_in_order),
    (_HAS(), values.no_repeated_effects),
    (_HAS(), values.recomputed_is_pure),
    (_HAS({"normal"}), values.saved_is_no_parameter),
    (_HAS({"normal"}), values.results_are_no_parameter),
    (_HAS({"normal"}), values.old_buffers_are_kept),
    (_HAS({"specialized"}), values.saved_is_complete),
    (_HAS({"specialized"}), copies.copies_are_waited_for),
    (_HAS({"specialized"}), copies.offloaded_once),
    (_HAS({"specialized"}), copies.offloaded_ends),
    (_HAS({"specialized"}), copies.reloaded_once),
    (_HAS({"specialized"}), shares.shared_once),
    (_HAS({"specialized"}), shares.shared_are_alike),
    (_HAS({"specialized"}), shares.shared_end),
    (_HAS({"specialized"}), shares.gathered_once),
    (_HAS({"specialized"}), arenas.rows_are_apart),
    (_HAS({"specialized"}), arenas.rows_are_large_enough),
    (_HAS({"specialized"}), arenas.kept_once),
    (_HAS({"specialized"}), arenas.nothing_leaves_in_an_arena),
    (_HAS({"scaled"}), gradients.gradients_are_scaled),
    (_HAS({"sharded"}), collectives.params_lie_in_their_bucket),
    (_HAS({"gathered"}), collectives.params_are_gathered),
    (_HAS({"gathered"}), collectives.collectives_are_waited_for),
    (_HAS({"gathered"}), collectives.buckets_stay_apart),
    (_HAS({"gathered"}), axes.axes_fit),
    (_HAS({"gathered"}), axes.slices_are_kept),
    (_HAS({"released"}), collectives.gathers_are_released),
    (_HAS({"reduced"}), gradients.gradients_are_reduced_once),
    (_HAS({"reduced"}), gradients.accumulated_once),
    (_HAS({"in_place"}), gradients.written_in_place),
    (_HAS({"updated"}), gradients.reductions_agree),
    (_HAS({"updated"}), step.updated_once),
    (_HAS({"updated"}), step.updates_agree),
    (_HAS({"updated"}), step.norm_covers_all),
    (_HAS({"updated"}), step.norm_counts_each_once),
    (_HAS({"updated"}), step.updates_stand_behind_reads),
    (_HAS({"updated"}), norms.measured_once),
    (_HAS({"updated"}), norms.norms_are_whole),
    (_HAS({"updated"}), collectives.refreshes_are_waited_for),
    (_HAS({"scheduled"}), collectives.the_step_starts_what_the_forward_takes),
    (_HAS({"scheduled"}), collectives.bound_holds),
    (_HAS({"scheduled"}), brackets.regions_are_bracketed),
)
"""What must have been provided, and the check that then holds. The order is that of the passes."""
