"""Start Python programs in a fraction of a second: forked from a process that has imported everything once.

``executable()`` is the path of a stand-in for ``sys.executable``. It hands words, environment, folder and the
three streams to the server, passes signals on, and ends as the program ended; if it is killed, so is the
program. What the program starts by ``sys.executable`` is forked too. Programs that need a start of their own
(with shape checking, or options other than ``-u`` and ``-P``) get the real Python.
"""

from __future__ import annotations

import atexit
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from tests.support.repository import ROOT

CLIENT = """\
#!{python} -SE
import array, json, os, signal, socket, struct, sys

words = sys.argv[1:]
while words and words[0] in ("-u", "-P"):
    words.pop(0)
program_given = words and (words[0] in ("-m", "-c") or not words[0].startswith("-"))
if os.environ.get("KAVA_SHAPE_CHECK", "0") != "0" or not program_given:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
asked = json.dumps([words, dict(os.environ), os.getcwd()]).encode()
streams = array.array("i", [0, 1, 2])
server.sendmsg([struct.pack("!I", len(asked))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
server.sendall(asked)
told = server.makefile("r")
program = int(told.readline())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT):
    signal.signal(number, lambda number, _: os.kill(program, number))
code = int(told.readline())
if code < 0:
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""

SERVER = """
import array, atexit, gc, json, os, runpy, select, signal, socket, struct, sys, threading, traceback
import accelerate.commands.accelerate_cli, torch.distributed.run, kava_core.cli.app
import kava_core.train.run, kava_core.jobs.export, kava_core.costs.plan, tests.support.tiny
address, client = sys.argv[1:]

def serve():
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        readable, _, _ = select.select([listener, 0], [], [])
        if 0 in readable:
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            attend(connection)
        connection.close()

def attend(connection):
    head, rights, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(12))
    streams = array.array("i", rights[0][2])
    (size,), asked = struct.unpack("!I", head), b""
    while len(asked) < size:
        asked += connection.recv(size - len(asked))
    program = os.fork()
    if program == 0:
        connection.close()
        os._exit(begin(streams, *json.loads(asked)))
    for stream in (*streams, 1, 2):
        os.close(stream)
    try:
        connection.sendall(b"%d\\n" % program)
        ended = os.pidfd_open(program)
        readable, _, _ = select.select([ended, connection], [], [])
        if connection in readable:
            os.kill(program, signal.SIGKILL)
    finally:
        code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
        try:
            connection.sendall(b"%d\\n" % code)
        finally:
            os._exit(0)

def begin(streams, words, environment, folder):
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    sys.executable = client
    sys.argv = words[1:] if words[0] in ("-m", "-c") else words
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[0] = "" if words[0] in ("-m", "-c") else os.path.dirname(words[0])
    code = 0
    try:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        said = ended.code
        code = said if isinstance(said, int) else int(said is not None)
        if said is not None and not isinstance(said, int):
            print(said, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code & 255

serve()
"""


@cache
def executable() -> str:
    """Start the server, and return the path of the stand-in."""
    folder = Path(tempfile.mkdtemp(prefix="kava-quick-python-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    address, client = str(folder / "socket"), folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, address, str(client)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    atexit.register(server.stdin.close)
    assert server.stdout.readline() == "ready\n"
    return str(client)
