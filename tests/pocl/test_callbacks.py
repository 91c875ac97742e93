"""Progress is reported at a bounded rate; its first and its last report are never lost."""

from pocl.callbacks import throttle


def test_reports_are_spaced_and_the_end_is_never_dropped() -> None:
    reports: list[tuple[int, int]] = []
    times = iter([0.0, 0.2, 0.9, 1.0, 1.5, 1.6])
    report = throttle(lambda done, total: reports.append((done, total)), seconds=1.0, clock=lambda: next(times))
    for done in range(1, 7):
        report(done, 6)
    assert reports == [(1, 6), (4, 6), (6, 6)]
