"""Progress is reported at a bounded rate, its first and last word always."""

from pocl.progress import throttle


def test_reports_are_spaced_and_the_end_is_never_lost() -> None:
    seen: list[tuple[int, int]] = []
    times = iter([0.0, 0.2, 0.9, 1.0, 1.5, 1.6])
    report = throttle(1.0, lambda done, total: seen.append((done, total)), clock=lambda: next(times))
    for done in range(1, 7):
        report(done, 6)
    assert seen == [(1, 6), (4, 6), (6, 6)]
