"""Processes that are killed while they write a run, and what whoever goes on with the run finds."""

from pathlib import Path

from entries import told_by


def test_killed_at_any_step_of_writing_it_is_resumed_to_the_same_values(tmp_path):
    """A process for each step, which the kernel ends there; without JAX, whose threads do not survive a fork."""
    script = f"""
        import itertools, os, shutil, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from entries import touching
        from test_growing import BREW, OLD, begun, fill, locked, stored
        tmp, seen = Path({str(tmp_path)!r}), []
        started = begun(tmp / "started", boxes=[0])
        shutil.copytree(started, tmp / "whole")
        fill(tmp / "whole", OLD)
        whole, files = BREW.load(tmp / "whole"), sorted(stored(tmp / "whole"))
        for step in itertools.count(0, 7):
            path = tmp / str(step)
            shutil.copytree(started, path)
            child = os.fork()
            if not child:
                calls = itertools.count()
                with locked(path), touching(lambda: next(calls) == step and os.kill(os.getpid(), signal.SIGKILL)):
                    fill(path, OLD)
                os._exit(0)
            killed = os.waitpid(child, 0)[1] == signal.SIGKILL
            seen.append((killed, int((BREW.load(path, partial=True)["status"] == 0).sum())))
            with locked(path):
                fill(path, OLD)
            assert BREW.load(path).identical(whole), step
            assert [name for name in sorted(stored(path)) if not name.endswith(".partial")] == files, step
            if not killed:
                break
        print(seen)
    """
    seen = told_by(script)
    assert all(killed for killed, _ in seen[:-1])
    lanes = [lanes for _, lanes in seen]
    assert lanes == sorted(lanes)
    assert set(lanes) == {2, 3, 5, 6}  # boxes of two and of one, row by row
    assert len(lanes) > 6
