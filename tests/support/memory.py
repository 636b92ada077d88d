"""What a call allocates on a CPU, by the profiler's log of every allocation and free."""

from torch.profiler import ProfilerActivity, profile


def peak_bytes(step):
    """Return the most bytes that a call holds beyond those that were live before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        step()
    events = [e for e in log.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
