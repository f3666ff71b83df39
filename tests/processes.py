"""Two processes over gloo for tests: forked, so that nothing is imported again, with a hard limit of time."""

import multiprocessing
import os
import socket
import traceback


def together(function, *given, count=2, limit=120):
    """What `function(*given)` returned in each of `count` processes, or the text of its exception, or "killed"; rank by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    pipes, children = [], []
    for rank in range(count):
        near, far = fork.Pipe(duplex=False)
        child = fork.Process(target=_one, args=(rank, count, port, far, function, given))
        child.start()
        far.close()
        pipes.append(near)
        children.append(child)
    try:
        return [_answer(pipe, limit) for pipe in pipes]
    finally:
        for child in children:
            child.join(10)
            child.kill()


def _answer(pipe, limit):
    try:
        return pipe.recv() if pipe.poll(limit) else "no answer"
    except EOFError:
        return "killed"


def alone(function, *given):
    """The exit code of a forked process that runs `function(*given)`: -9 where it was killed."""
    child = multiprocessing.get_context("fork").Process(target=function, args=given)
    child.start()
    child.join(120)
    child.kill()
    return child.exitcode


def _one(rank, count, port, pipe, function, given):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        pipe.send(function(*given))
    except BaseException as error:
        pipe.send("".join(traceback.format_exception(error)))
