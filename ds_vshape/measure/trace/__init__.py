"""Timelines of real batches, by one key of the config:

    "pipeline_schedule": {"name": "v-half", "trace": {"batches": [10, 12], "path": "traces"}}

    recorder, arrivals    what each rank did, and when messages arrived
    clocks                how far apart the ranks' clocks are
    batch                 what is known of a batch then
    chrome, page          the trace for Perfetto, the page for a browser
    tracer                all of it around the batches that are named
"""

from ds_vshape.measure.trace.tracer import Tracer

__all__ = ["Tracer"]
