"""A worker process: answers, refusals, crashes, silence, and threads that do not rest."""

import sys

import pytest

from models.bench.worker import Worker, WorkerError

HEAD = "import json, os, signal, sys, threading, time\nfor line in sys.stdin:\n    request = json.loads(line)\n"


def worker(body, **options):
    return Worker("the worker", [sys.executable, "-c", HEAD + body], **options)


def test_it_answers_as_long_as_it_lives():
    with worker("    print(json.dumps({'value': request['x'] + 1}), flush=True)") as asked:
        assert [asked.ask(x=number)["value"] for number in (1, 2)] == [2, 3]


def test_what_it_cannot_do_is_an_error_of_that_question_only():
    body = "    print(json.dumps({'error': 'no'} if request['x'] else {'value': 1}), flush=True)"
    with worker(body) as asked:
        with pytest.raises(WorkerError, match="the worker: no"):
            asked.ask(x=1)
        assert asked.ask(x=0) == {"value": 1}


def test_a_crash_is_named_with_its_signal_and_last_words():
    body = "    print('loading tensors', file=sys.stderr, flush=True)\n    os.kill(os.getpid(), signal.SIGSEGV)"
    with worker(body) as asked:
        for _ in range(2):
            with pytest.raises(WorkerError, match=r"the worker ended with signal SIGSEGV.*loading tensors"):
                asked.ask(x=1)
        asked.wait_until_idle()


def test_an_exit_status_is_named():
    with worker("    sys.exit(3)") as asked, pytest.raises(WorkerError, match="exit status 3"):
        asked.ask(x=1)


def test_silence_ends_it():
    with worker("    time.sleep(60)", timeout_seconds=0.05) as asked, pytest.raises(WorkerError, match="not answer"):
        asked.ask(x=1)


def test_a_program_that_is_not_there():
    with pytest.raises(WorkerError, match="cannot be started"):
        Worker("the worker", ["/nonexistent/python"])


@pytest.mark.parametrize("shares", [[0.9, 0.5, 0.0], [0.05]])
def test_threads_are_waited_for_until_they_rest(monkeypatch, shares):
    left = list(shares)
    with worker("    print('{}', flush=True)") as asked:
        monkeypatch.setattr(Worker, "_processor_share", lambda self: left.pop(0))
        asked.wait_until_idle(patience_seconds=60.0)
    assert left == []


def test_threads_that_go_on_are_an_error(monkeypatch):
    with worker("    print('{}', flush=True)") as asked:
        monkeypatch.setattr(Worker, "_processor_share", lambda self: 0.9)
        with pytest.raises(WorkerError, match="uses 90% of a processor while it has nothing to do"):
            asked.wait_until_idle(patience_seconds=0.0)


def test_processor_time_of_the_worker_is_seen():
    with worker("    print('{}', flush=True)\n    while True: pass") as asked:
        assert asked.ask(x=1) == {}
        while asked._processor_share() == 0.0:  # it gets its turn some time, however busy the machine
            pass


def test_variables_can_be_kept_from_it(monkeypatch):
    monkeypatch.setenv("QERVE_TEST_A", "1")
    monkeypatch.setenv("QERVE_TEST_B", "1")
    body = "    print(json.dumps({n: n in os.environ for n in ('QERVE_TEST_A', 'QERVE_TEST_B')}), flush=True)"
    with worker(body, without=["QERVE_TEST_A"]) as asked:
        assert asked.ask() == {"QERVE_TEST_A": False, "QERVE_TEST_B": True}
