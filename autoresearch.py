"""autoresearch: an LLM does machine-learning research on its own.

    python autoresearch.py                            # runs until Ctrl-C; run it again to continue
    python autoresearch.py --confirm 5                # runs baseline and incumbent 5 times more
    python autoresearch.py --confirm 5 --budget 120   # the same at another budget

The driver reads program.md, asks an LLM for one change to train.py, trains the changed file as a
subprocess under a time limit, keeps the change if it helped, appends a row to results.tsv, and
goes on all night. Lab.research is that sentence as code. This file reads like a newspaper: what
matters comes first, and each part is followed by the parts that it uses.

Experiment    one candidate train.py and all that was done with it; runs/0007/ is experiment 7
Run           one training of it with one seed
Budget        the seconds for which each run may train
Incumbent     the best train.py so far; the file train.py always is the incumbent
Baseline      experiment 0: train.py as it was at the first start
Researcher    who proposed an experiment: llm, search, human, or baseline
Search        random moves of the numbers in train.py: the control, and a filler of idle time
Noise         the standard deviation of the score, val_bpb (bits per byte), between seeds
Accelerator   what a run trains on: a GPU, or the CPU; --workers says how many there are
Conditions    what has to stay the same if scores are compared: data, budget, device, ...
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import html
import inspect
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, mode

import requests

if sys.version_info < (3, 11) or os.name == "nt":
    raise SystemExit("autoresearch.py needs Python 3.11 or newer and, on Windows, WSL2")
import fcntl

RUNS = 2                # runs of a candidate; its score has to be better after each of them
WIN = 1.0               # standard errors by which longer code has to win
BASELINE_RUNS = 3       # runs of the baseline, which give the first estimate of the noise
NOISE_PROGRAMS = 6      # the noise is pooled over this many of the newest programs that ran twice
RECHECK = 8             # after this many discards in a row the incumbent runs once more
CRASHES = 3             # after this many in a row the incumbent runs, to test the machine
IDLE_SHARE = 0.2        # the search starts after an accelerator was idle for this part of a budget
RETURNS = 2             # how often a proposal may go back to the LLM, with what was wrong
HISTORY = 100           # the newest experiments that a prompt tells of; it tells of all keeps

# ---- 1  An experiment, and the judge ------------------------------------------------------------
@dataclass(eq=False)    # compared by identity, so that they can be keys of a dict
class Experiment:
    """One candidate and all that was done with it. runs/NNNN/experiment.json is exactly this."""

    number: int
    by: str                     # the researcher who proposed it
    description: str = ""       # what it changes, in a few words
    why: str = ""               # why that should help, in the LLM's words
    source: str = ""            # the candidate train.py, once there is one
    fingerprint: str = ""       # a hash of its program, which comments do not change
    code_lines: int = 0         # its lines without comments, in a layout that is always the same
    base: int = 0               # the number of the incumbent that it changes
    runs: list[dict] = field(default_factory=list)  # reports of runs with a score; "did" is prose
    status: str = ""            # "keep", "discard" or "crash"; "" until it is judged
    reason: str = ""            # why it has this status
    place: int = 0              # its place among the verdicts, from 1; 0: it has no verdict yet
    counted: int = 0            # the verdict rests on this many runs; the incumbent may get more
    commit: str = ""            # git's name of a kept change
    finished: str = ""          # when it was judged
    fresh: dict[str, list[dict]] = field(default_factory=dict)  # --confirm: runs by "#7 at 60 s"
    turns: list[str] = field(default_factory=list)  # the LLM's reply, our complaint, a reply, ...
    tries: int = 0              # runs that began; this numbers the logs and the seeds
    ended: int = 0              # runs that ended; in the others, tries - ended, the driver died
    model: str = ""             # the LLM that was asked
    calls: int = 0              # requests that it answered, also to no use
    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def folder(self) -> Path:
        return FOLDER / f"{self.number:04d}"

    @property
    def scores(self) -> list[float]:
        """Return the newest scores only: the machine may have changed since the older ones."""
        return [run["val_bpb"] for run in self.runs[-max(RUNS, BASELINE_RUNS):]]

    def save(self):
        if self.source:
            write_whole(self.folder / "train.py", self.source)
        write_whole(self.folder / "experiment.json", vars(self))


def score(scores: list[float]) -> float:
    """Return what the judge compares: the mean of a program's val_bpb over its runs."""
    return fmean(scores) if scores else math.nan


def judge(candidate: list[float], incumbent: list[float], noise: float, longer: bool) -> str:
    """Return "discard", "again" (run it on a fresh seed) or "keep". Lower scores are better.

    A candidate has to be better after each of RUNS runs. If its code is longer, it has to be
    better by a margin. The table shows the share of candidates that is kept if the true gain is
    0, 1, 2 and 4 times the noise and the incumbent has 3 runs (simulated; greedy: after one run):

        more code       10%  38%  74%  99%
        anything else   39%  77%  95% 100%
        greedy          50%  81%  96% 100%
    """
    if not candidate:
        return "again"
    gain = score(incumbent) - score(candidate)
    needed = WIN * standard_error(len(candidate), len(incumbent), noise) if longer else 0.0
    if gain > 0 and gain >= needed:     # a gain that is not a number ends as a discard
        return "keep" if len(candidate) >= RUNS else "again"
    return "discard"


# ---- 2  The loop --------------------------------------------------------------------------------
class Lab:
    """The experiments, the accelerators, and the workers that share them.

    With an LLM, three workers come with each accelerator, "llm", "llm" and "search": while a run of
    one trains, the other has the LLM draft the next proposal; the search uses an accelerator that
    both leave idle. Without an LLM, it is one worker, "search".
    """

    async def research(self, by: str):
        """Propose, run, judge, record, until there are as many experiments as asked for."""
        while exp := self.take(by):                     # an experiment that waits, or a new one
            try:
                await self.propose(exp)                 # takes minutes, if an LLM does it
                async with self.accelerator(exp) as gpu:    # the first that is free
                    while not exp.status:
                        self.build(exp)                 # the change, applied to the incumbent
                        if self.decide(exp) == "again":     # judge its runs, and record it
                            await self.run(exp, gpu)    # train it once more, on a new seed
            except Unusable as problem:                 # a reply that does not fit, or a crash
                self.send_back(exp, problem)
            except Finished:                            # exp waits for the next start
                return
            finally:
                self.active.remove(exp)

    # 1. The workers are tasks in one thread. Between two awaits nobody else changes anything, so
    #    they need no lock. Judging and recording have no await between them: two keeps cannot
    #    overtake each other.
    # 2. A worker holds an accelerator only inside `async with self.accelerator(...)`, and asks the
    #    LLM only outside. So an endpoint that hangs holds up neither an accelerator nor the exit.
    # 3. A candidate is judged only against the incumbent that it changes. If another one was kept
    #    meanwhile, it is built again on that, and if this changes its text, its runs count no more.
    #    A person's edit is a whole file: its text stays, and its runs count.
    # 4. A keep is written in this order: train.py (an edit in it is saved first), the commit,
    #    experiment.json with the status, the row. After a kill, the saved runs are judged again.

    def __init__(self, args: argparse.Namespace):
        asks_llm = args.researcher == "llm" and not args.confirm and args.experiments != 0
        self.args = args
        self.llm = LLM(args.base_url, args.model) if asks_llm else None     # None: search alone
        self.experiments = {exp.number: exp for exp in saved_experiments()}
        self.judged = sorted((exp for exp in self.experiments.values() if exp.status),
                             key=lambda exp: exp.place)     # in the order of their verdicts
        self.active: list[Experiment] = []              # those that a worker has taken
        self.conditions = read_json(CONDITIONS)
        args.budget = args.budget or self.conditions.get("budget")
        self.confirmed = read_json(CONFIRMED)           # budget -> what --confirm measured
        self.left = math.inf                            # experiments still to be recorded
        self.discards = 0                               # in a row, since the incumbent last ran
        self.crashes = collections.Counter()            # gpu -> crashes in a row
        self.free: dict[int, float] = {}                # gpu -> since when it is free
        self.live: dict[int, str] = {}                  # gpu -> how far its run is
        self.program = ""                               # the last program.md that could be read
        self.history = HISTORY                          # how many experiments a prompt tells of
        self.tokens = 0                                 # in and out, in this start
        self.away = False                               # True while the LLM gives no answer
        self.pause = 0.0                                # seconds before the next request

    @property
    def incumbent(self) -> Experiment:
        return (kept(self.judged) or [self.experiments[0]])[-1]

    @property
    def waiting(self) -> list[Experiment]:
        """Return those that are neither judged nor taken: sent back, edited, left by a kill."""
        return [exp for exp in self.experiments.values()
                if not exp.status and exp not in self.active]

    def take(self, by: str) -> Experiment | None:
        """Return an experiment that waits, or a new one. None: enough are in progress."""
        if self.left <= 0:
            raise Finished      # outside of the try in research(): it ends all workers
        self.save_edit()
        if [exp.by for exp in self.active].count(by) >= self.left:
            return None         # no more drafts at a time than experiments that are left
        mine = [exp for exp in self.waiting
                if exp.by in (by, "human")                  # any worker takes a person's edit
                or (exp.source and not self.llm)]           # or a finished draft, without an LLM
        mine.sort(key=lambda exp: exp.by != "human")    # a person's edit is the first in line
        self.active += mine[:1] or [self.new_experiment(by)]
        return self.active[-1]

    def new_experiment(self, by: str, description: str = "", source: str = "") -> Experiment:
        folders = [int(path.name) for path in FOLDER.glob("[0-9]*") if path.name.isdecimal()]
        number = max([*self.experiments, *folders]) + 1     # no folder is ever used twice
        self.experiments[number] = Experiment(number, by, description, source=source)
        return self.experiments[number]

    def save_edit(self):
        """Make a person's edit of train.py an experiment, and train.py the incumbent again."""
        best = self.incumbent
        source = read(TRAIN) if TRAIN.exists() else ""
        if source == best.source or not source.strip():     # empty while an editor writes it
            return
        with contextlib.suppress(Unusable):     # one that does not parse will be a crash
            fingerprint, code_lines = program_of(source)
            if fingerprint == best.fingerprint:
                best.source, best.code_lines = source, code_lines
                best.save()
                return say(f"{TRAIN} was edited: the same program with other comments")
        edit = self.new_experiment("human", f"a person's edit of {TRAIN}", source)
        edit.save()
        write_whole(TRAIN, best.source)
        say(f"{TRAIN} was edited: {edit.folder / TRAIN} runs next; {TRAIN} is the incumbent again")

    async def propose(self, exp: Experiment):
        """Have the LLM write a reply that fits. The search proposes in build()."""
        if exp.by == "llm":
            while len(exp.turns) % 2 == 0:      # until its last turn is a reply
                await self.ask(exp)
            self.build(exp)     # a misfit shows before an accelerator is taken

    async def ask(self, exp: Experiment):
        """Ask the LLM once. Its reply becomes a turn of exp, if one comes."""
        await asyncio.sleep(self.pause * random.uniform(1, 1.5))    # not all workers at once
        if not (llm := self.llm):
            raise Finished      # --tokens are used
        prompt, base = make_prompt(self, exp), self.incumbent.number
        write_whole(exp.folder / f"prompt-{exp.calls}.md", "".join(prompt))
        try:
            answer = await in_thread(llm.ask, prompt, exp.turns)
        except Away as absence:
            return self.note_absence(exp, *absence.args)
        # The reply was paid for, so it is saved at once.
        write_whole(exp.folder / f"reply-{exp.calls}.md", answer.text)
        write_whole(exp.folder / f"response-{exp.calls}.json", answer.raw)
        exp.turns.append(answer.text.strip() or "(nothing)")
        exp.base, exp.model, exp.calls = base, llm.model, exp.calls + 1
        exp.input_tokens += answer.input_tokens
        exp.output_tokens += answer.output_tokens
        exp.save()
        self.tokens += answer.input_tokens + answer.output_tokens
        self.history = min(HISTORY, self.history + 1)   # it grows back after a halving
        if self.away:
            say("LLM: it answers again")
            self.away, self.pause = False, 0.0
        if self.llm and self.args.tokens and self.tokens >= self.args.tokens:
            say(f"LLM: {self.tokens} tokens are used (--tokens); the search goes on alone")
            self.llm = None
        if not answer.complete:
            raise Unusable(f"the reply is not complete ({answer.finish_reason}): be brief")

    def note_absence(self, exp: Experiment, reason: str, too_long: bool):
        """Wait longer before the next request, and tell less in it if the prompt was too long."""
        if too_long:
            self.history, exp.turns = self.history // 2, []
        if not self.away:
            say(f"LLM: {reason}; it is asked again at times, and the search fills in")
        self.away = True
        self.pause = min(2 * self.pause + 0.25, LONGEST_PAUSE)

    @contextlib.asynccontextmanager
    async def accelerator(self, exp: Experiment) -> AsyncIterator[int]:
        """Wait for a free accelerator and have it until the end of the block."""
        while not self.may_start(exp):
            await asyncio.sleep(0.02)       # polling is simpler than events for each change
        gpu = min(self.free, key=self.free.get)     # the one that has been free for longest
        del self.free[gpu]
        try:
            yield gpu
        finally:
            self.free[gpu] = time.monotonic()
            self.live.pop(gpu, None)
            show(" | ".join(self.live.values()) or ("waiting for the LLM" if self.llm else ""))

    def may_start(self, exp: Experiment) -> bool:
        if exp.by != "search" or not self.llm or not self.free:
            return bool(self.free)      # only a search that has an LLM beside it has to wait
        # The search only fills in, for whatever reason the LLM leaves an accelerator idle.
        idle = time.monotonic() - min(self.free.values())
        return idle >= IDLE_SHARE * self.conditions.get("budget", 60)

    def build(self, exp: Experiment):
        """Make exp a change of the present incumbent, if it is not yet. Raises Unusable."""
        best = self.incumbent
        if exp.fingerprint and exp.base == best.number:
            return
        known = {other.fingerprint: other.number for other in self.experiments.values()
                 if other is not exp}
        source = exp.source             # a person's file is used as it is
        if exp.by == "llm":
            exp.description, exp.why, blocks = read_reply(exp.turns[-1], best.source)
            if exp.base != best.number and blocks[0][0] == best.source:     # it would undo a keep
                raise Unusable("a whole file, but the incumbent has changed since you wrote it")
            source = edited(best.source, blocks)
        if exp.by == "search":
            rng = random.Random(f"{exp.number} {best.fingerprint}")
            cuda = self.conditions.get("device") not in ("cpu", "mps")
            moves = random_moves(rng, best.source, cuda)
            new = next((move for move in moves if program_of(move[1])[0] not in known), None)
            if not new:
                say("the search has nothing new to propose: edit train.py, or connect an LLM")
                raise Finished
            exp.description, source = new
        fingerprint, code_lines = program_of(source)
        if exp.by == "llm" and fingerprint in known:
            raise Unusable(f"the same program as #{known[fingerprint]}, but for comments")
        if source != exp.source:
            exp.runs = []               # they were runs of another program
        exp.source, exp.fingerprint = source, fingerprint
        exp.code_lines, exp.base = code_lines, best.number
        exp.save()

    def decide(self, exp: Experiment) -> str:
        """Return the judge's verdict on the runs so far, and record it if it is final."""
        best, noise = self.incumbent, noise_of(self.judged)
        verdict = judge(exp.scores, best.scores, noise, exp.code_lines > best.code_lines)
        gain = score(best.scores) - score(exp.scores)
        in_noise = f" ({gain / noise:+.1f} noise)" if noise else ""
        reason = f"{gain:+.4f}{in_noise} against #{best.number}"
        if verdict != "again":
            self.record(exp, verdict, reason)
        elif exp.runs:
            say(f"#{exp.number} {exp.by} {exp.scores[-1]:.4f} runs once more: {reason}")
        return verdict

    async def run(self, exp: Experiment, gpu: int):
        """Train exp once more. Raises Unusable if it crashes and the machine is not to blame."""
        if self.discards >= RECHECK:    # perhaps the incumbent was lucky, and blocks all others
            await self.run_incumbent(gpu, f"{RECHECK} discards in a row lost to it")
        try:
            await self.train(exp, gpu, exp.runs)
        except Unusable:
            self.crashes[gpu] += 1
            in_a_row = f"{CRASHES} crashes in a row"
            if self.crashes[gpu] < CRASHES or await self.run_incumbent(gpu, in_a_row):
                raise
            return          # the incumbent could not run either, so exp is tried again
        self.crashes[gpu] = 0
        if exp.by == "llm":
            self.pause = 0.0        # its reply could be trained, so it is asked at full speed

    async def run_incumbent(self, gpu: int, why: str) -> bool:
        """Run the incumbent until it gets a score. True: it did at once, so the machine is well."""
        best, pause = self.incumbent, 0.0
        self.discards = self.crashes[gpu] = 0
        say(f"#{best.number}, the incumbent, runs once more: {why}")
        while True:
            try:
                await self.train(best, gpu, best.runs)
                return pause == 0
            except Unusable as problem:
                pause = min(2 * pause + 0.25, LONGEST_PAUSE)
                say(f"the machine is in trouble: {problem.reason}; tried again in {pause:g} s")
                await asyncio.sleep(pause)

    async def train(self, exp: Experiment, gpu: int, runs: list[dict]):
        """Train exp on a seed of its own, and append the report to `runs`. Raises Unusable."""
        patience = math.inf if self.args.launch else START_LIMIT    # a launcher may queue the run
        for pause in FALSE_STARTS:
            await asyncio.sleep(pause)
            k, exp.tries = exp.tries, exp.tries + 1
            exp.save()          # the run counts before it begins, since it may kill the driver
            command = [*self.args.launch, sys.executable, "prepare.py", "--run",
                       exp.folder / "train.py", "--seed", 1000 * exp.number + k + 1,
                       "--folder", self.data_folder]
            if self.args.budget:        # else prepare.py has one
                command += ["--budget", self.args.budget]
            tell = functools.partial(self.tell, exp, gpu)
            try:
                runs.append(await run_command(
                    [*map(str, command)], exp.folder / f"run-{k}.log",
                    self.variables[gpu], patience, tell))
                return
            except Unusable as problem:
                if problem.started:
                    raise
                reason = problem.reason     # a launcher or the machine is to blame, and not exp
            finally:            # also if the run is cancelled
                exp.ended += 1
                exp.save()
            say(f"#{exp.number} did not start: {reason}")
        raise Stop(f"{len(FALSE_STARTS)} runs in a row did not even start: {reason}")

    def tell(self, exp: Experiment, gpu: int, event: dict, printed: str):
        """Use what prepare.py tells of a run: the conditions, and how far it is."""
        if event["event"] == "setup":
            self.check_conditions(event)
        share = f" {event['share']:.0%}" if "share" in event else ""
        self.live[gpu] = f"#{exp.number} {exp.by} run {exp.tries} {event['event']}{share} {printed}"
        show(" | ".join(self.live.values()))

    def record(self, exp: Experiment, status: str, reason: str):
        """Make a verdict durable. After a kill before exp is saved, it is judged again."""
        if self.left <= 0:
            raise Finished              # the next start judges it
        self.save_edit()                # before train.py is written over
        if status == "keep" and exp.number:
            write_whole(TRAIN, exp.source)
            exp.commit = git_commit(exp.description, reason)
        exp.status, exp.reason = status, one_line(reason)
        exp.place, exp.counted = len(self.judged) + 1, len(exp.runs)
        exp.finished = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        exp.save()
        with open(LEDGER, "ab", buffering=0) as file:
            file.write(f"{row_of(exp)}\n".encode())
            os.fsync(file.fileno())
        self.judged.append(exp)
        self.left -= 1
        if status != "crash":
            self.discards = self.discards + 1 if status == "discard" else 0
        self.draw()
        say(line_of(exp))

    def draw(self):
        write_whole(PLOT, progress_svg(self.judged, self.confirmed,
                                       self.conditions.get("budget", 0)))

    def send_back(self, exp: Experiment, problem: Unusable):
        """Send exp back to its LLM with what is wrong; without one, or after RETURNS: a crash."""
        reason = problem.reason
        is_asked = exp.by == "llm" and self.args.researcher == "llm"
        if not is_asked or len(exp.turns) // 2 >= RETURNS:
            return self.record(exp, "crash", reason)
        log = problem.log.replace("`", "'")     # no backtick may end the fence
        log = f"\nThe end of its log, as data:\n```\n{log}\n```" if log else ""
        exp.turns.append(f"That could not be used: {reason}{log}\nReply again, complete and in "
                         f"the form asked for, with edits of the incumbent as shown above.")
        exp.source, exp.fingerprint, exp.runs = "", "", []
        exp.save()
        self.pause = min(2 * self.pause + 0.25, LONGEST_PAUSE)
        say(f"#{exp.number} goes back to the LLM in {self.pause:g} s: {one_line(reason, 100)}")

    async def night(self):
        """Research until there is enough of it, something fails, or somebody stops it."""
        if self.conditions:     # budget and judge are known now, the rest when a run tells it
            self.check_conditions(self.conditions | {"budget": self.args.budget})
        self.recover()
        await self.get_ready()
        self.free = dict.fromkeys(range(self.args.workers), time.monotonic())
        if self.args.confirm:
            return await self.confirm(self.args.confirm)
        if not self.judged:
            await self.measure_baseline()
        self.left = self.args.experiments or math.inf
        workers = ["llm", "llm", "search"] if self.llm else ["search"]
        with contextlib.suppress(Finished):     # asyncio.run() then ends the other workers
            await asyncio.gather(*map(self.research, self.args.workers * workers))

    def recover(self):
        """Go on where the last start ended, and leave train.py as the incumbent."""
        mend_ledger(self.judged)
        if not self.judged:
            return
        # A kill between the writes of a keep has left a candidate in train.py. It still waits, and
        # is judged again. Anything else there that is not the incumbent is a person's edit.
        if not TRAIN.exists() or read(TRAIN) in [exp.source for exp in self.waiting]:
            write_whole(TRAIN, self.incumbent.source)
        for exp in self.waiting:
            if exp.tries - exp.ended >= DEATHS:
                self.record(exp, "crash", f"the driver or the machine died {DEATHS} times under it")

    async def get_ready(self):
        """Find the data, the accelerators and the LLM, and say what is used."""
        self.data_folder = Path(self.conditions.get("folder", "none"))    # no folder is named none
        if self.args.data or not (self.data_folder / "meta.json").exists():
            self.data_folder = Path(await ask_prepare("--data", self.args.data or ""))
        self.variables = await environments(self.args)
        if self.llm:
            say(await in_thread(self.llm.greet))
        elif not self.args.confirm:
            say(f"researcher  search; for an LLM set {CONNECT}")
        say(f"data        {self.data_folder.name}")
        say(f"results     {len(self.judged)} rows in {LEDGER}, {PLOT}; after Ctrl-C, run it again")

    def check_conditions(self, event: dict):
        """Refuse a run whose score could not be compared with the baseline's."""
        event = event | {"judge": judge_version()}
        if not self.conditions:
            self.conditions = event | {"folder": str(self.data_folder)}
            write_whole(CONDITIONS, self.conditions)
        for name in MUST_NOT_CHANGE:
            old, new = self.conditions.get(name), event.get(name)
            if old != new and not (name == "budget" and self.args.confirm):
                raise Stop(f"{LEDGER} was measured with {name} {old} and this start has {new}: "
                           f"start it as before, or begin anew: {BEGIN_ANEW}")

    async def measure_baseline(self):
        """Make train.py as found the first incumbent, by BASELINE_RUNS runs."""
        source, base = read(TRAIN), self.experiments.get(0)
        if base is None or base.source != source:       # else it goes on with the runs it has
            base = Experiment(0, "baseline", "baseline", source=source)
            base.fingerprint, base.code_lines = program_of(source)
        self.experiments[0] = base
        say(f"baseline    {TRAIN} as it is (or: git checkout {TRAIN}), {BASELINE_RUNS} runs")
        await self.train_all([(base, base.runs)] * (BASELINE_RUNS - len(base.runs)))
        self.record(base, "keep", "the baseline")

    async def confirm(self, n: int):
        """Run baseline and incumbent n times each, on seeds that decided nothing."""
        if not self.judged or not self.incumbent.number:
            raise Stop("nothing was kept yet, there is no gain to confirm: leave out --confirm")
        base, best, budget = self.experiments[0], self.incumbent, self.args.budget
        name = f"#{best.number} at {budget:g} s"
        fresh = {exp: exp.fresh.setdefault(name, []) for exp in (base, best)}
        say(f"confirm     #0 and {name}, {n} runs each")
        # They run in turns, so that a machine that slows down slows both.
        await self.train_all([(exp, runs) for i in range(n) for exp, runs in fresh.items()
                              if i >= len(runs)])       # an earlier start did the others
        before, after = fresh.values()
        result = {"budget": budget, "incumbent": best.number, "n": min(len(before), len(after)),
                  "baseline_runs": before, "incumbent_runs": after}
        for metric, prefix in ("val_bpb", ""), ("test_bpb", "test_"):
            a, b = ([run[metric] for run in runs] for runs in (before, after))
            noise = pooled_noise([a, b]) or noise_of(self.judged)   # n = 1 shows no noise
            gain, error = score(a) - score(b), standard_error(len(a), len(b), noise)
            result |= {f"{prefix}gain": gain, f"{prefix}error": error}
            say(f"{metric}: gain {gain:.4f} ± {error:.4f} (standard error) at {budget:g} s")
        self.confirmed[f"{budget:g}"] = result
        write_whole(CONFIRMED, self.confirmed)
        self.draw()

    async def train_all(self, todo: list[tuple[Experiment, list[dict]]]):
        """Train experiments, in this order, as accelerators become free."""
        async def train_one(exp: Experiment, runs: list[dict]):
            async with self.accelerator(exp) as gpu:
                await self.train(exp, gpu, runs)

        await asyncio.gather(*itertools.starmap(train_one, todo))


async def in_thread(call: Callable, *args: object) -> object:
    """Await a call that blocks. asyncio.to_thread() would wait for its thread at the exit."""
    future = concurrent.futures.Future()
    future.set_running_or_notify_cancel()       # from here on, cancel() does nothing to it

    def work():
        try:
            future.set_result(call(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return await asyncio.wrap_future(future)


def program_of(source: str) -> tuple[str, int]:
    """Return the fingerprint of a train.py, and its lines of code. Raises Unusable."""
    code = code_in(source)
    if not re.search(r"(?m)^def train\(", code):
        raise Unusable("train.py has to define train() -> torch.nn.Module at top level")
    return hashlib.sha256(code.encode()).hexdigest()[:16], len(code.splitlines())


class Stop(Exception):
    """Ends the driver with one line: what happened, and what to type next."""


class Finished(Exception):
    """Ends a worker that has nothing more to do; from take(), all of them."""


@dataclass(eq=False)
class Unusable(Exception):
    """A candidate gets no score."""

    reason: str
    log: str = ""           # the end of what its run printed
    started: bool = True    # False if not even prepare.py began, so the candidate is not to blame


LONGEST_PAUSE = 300     # seconds between two attempts, while something fails again and again
FALSE_STARTS = 0, 1, 4, 16, 64  # seconds before each try to start a run; then the driver ends
DEATHS = 2              # if the driver died so often during runs of one candidate, it is a crash

# ---- 3  The judge's numbers ---------------------------------------------------------------------
def standard_error(k: int, n: int, noise: float) -> float:
    """Return the standard error of the difference of two means, of k and of n runs."""
    return noise * math.sqrt(1 / k + 1 / n)


@functools.cache        # getsource() reads the file, which may be edited during the night
def judge_version() -> str:
    """Return a hash of what decides a verdict: another judge needs a new ledger."""
    parts = Experiment.scores.fget, score, judge, standard_error, noise_of, pooled_noise
    code = [code_in(textwrap.dedent(inspect.getsource(part))) for part in parts]
    numbers = str((RUNS, WIN, BASELINE_RUNS, NOISE_PROGRAMS))
    return hashlib.sha256("".join([*code, numbers]).encode()).hexdigest()[:16]


def noise_of(judged: list[Experiment]) -> float:
    """Estimate the noise from the newest programs that ran more than once."""
    groups = [exp.scores for exp in judged if len(exp.scores) > 1]
    return pooled_noise(groups[-NOISE_PROGRAMS:])


def pooled_noise(groups: list[list[float]]) -> float:
    """Return the pooled standard deviation of programs that ran repeatedly; 0.0 without any."""
    squares = sum((x - fmean(group)) ** 2 for group in groups for x in group)
    freedom = sum(len(group) - 1 for group in groups)
    return math.sqrt(squares / freedom) if freedom else 0.0


# ---- 4  The prompt ------------------------------------------------------------------------------
# Who changes judge() has to change the first rule. make_prompt() appends prepare.py's rules.
RULES = f"""You do machine-learning research: each experiment is a new train.py, trained for a
fixed time. Reply in exactly this form, nothing else:

DESCRIPTION: what changes, in a few words
Two or three sentences: why it should help, and what you expect.

<<<<<<< SEARCH
lines copied exactly from the incumbent train.py
=======
lines to stand in their place
>>>>>>> REPLACE

Give as many such blocks as needed. Each SEARCH must match the incumbent exactly once: copy enough
whole lines to be unique. A rewrite is the whole new file in one ```python fence. Another change
may be kept first; then a rewrite is asked for again, and edits still have to fit: have in a SEARCH
only those `NAME = number` lines that you change, and define new names beside their use. The rules:
- A change is kept if val_bpb is lower after each of {RUNS} runs. If the code is longer, comments
  aside, it has to win by {WIN:g} * noise * sqrt(1/k + 1/n) each time: k runs against n of the old.
- A gain has to travel: the person also measures it at half and at twice the budget.
"""
NOT_FOR_PROMPTS = "contract event folder judge limit name prepare sha256 threads".split()


def make_prompt(lab: Lab, exp: Experiment) -> list[str]:
    """Return the prompt in parts, what changes least first: providers cache its beginning."""
    with contextlib.suppress(OSError):      # there is no file while an editor replaces it
        data = PROGRAM.read_bytes()         # in UTF-8 or UTF-16: its bytes tell
        lab.program = data.decode(json.detect_encoding(data), "replace") or lab.program
    if not lab.program:
        raise Stop(f"{PROGRAM} cannot be read: write one, or git checkout {PROGRAM}")
    rules = (f"{RULES}{lab.conditions.get('contract', '')}\n\n"
             f"The person you work for says:\n{lab.program}")
    facts = [f"{name}: {fact}\n" for name, fact in lab.conditions.items()
             if name not in NOT_FOR_PROMPTS and not name.startswith("test_")]
    best = lab.incumbent
    begin = (f"# The machine\n{''.join(facts)}\n"
             f"# The incumbent: experiment {best.number}\n"
             f"```python\n{best.source.rstrip()}\n```\n\n"
             f"# History, oldest first: verdict, val_bpb (who): what | gain; its first run\n")
    past = [told(old) for i, old in enumerate(lab.judged)
            if old.status == "keep" or i >= len(lab.judged) - lab.history]
    now = (f"\n# Now\nThe incumbent has {score(best.scores):.4f} from {len(best.scores)} runs. "
           f"Its newest run: {best.runs[-1].get('did', 'no details')}. "
           f"Noise: {noise_of(lab.judged):.4f}.\n")
    log = best.folder / f"run-{best.tries - 1}.log"
    for line in read(log).splitlines()[-3:] if log.exists() else []:
        now += f"The end of its newest log, as data: {one_line(line, 200)}\n"
    for other in lab.active:
        if other is not exp:
            what = other.description or "somebody drafts it from this prompt: go another way"
            now += f"In progress: #{other.number}: {what}\n"
    return [rules, begin, *past, now + "Propose the next experiment."]


def told(exp: Experiment) -> str:
    """Return what the history tells of an experiment; never its test_bpb."""
    did = exp.runs[0].get("did", "no details") if exp.runs else "no score"
    why = f"    why: {one_line(exp.why, 200)}\n" if exp.why else ""
    return (f"#{exp.number} {exp.status} {score(exp.scores):.4f} ({exp.by}): "
            f"{exp.description} | {exp.reason}; {did}\n{why}")


# ---- 5  A run: one training in a process group of its own, under time limits --------------------
LOG_LIMIT = 10_000_000  # bytes of output after which a run is ended; a usual one prints 10 kB
START_LIMIT = 300       # seconds until a run on this machine has to say that it has started
GRACE = 3               # seconds from SIGTERM to SIGKILL
# The numbers that a report of prepare.py has to have.
NEEDED = ["val_bpb", "test_bpb", "train_seconds", "total_seconds", "peak_memory_mb"]


async def run_command(command: list[str], log: Path, variables: dict[str, str],
                      patience: float, on_event: Callable) -> dict:
    """Run a command and return what prepare.py reported. Raises Unusable without a score.

    prepare.py prints events, as lines "KEY {json}". One with a "limit" begins a phase: the next
    phase has to begin within so many seconds, and the first one within `patience`.
    """
    key, now = os.urandom(16).hex(), time.monotonic()
    event, phase, cause = {}, "before it started", "ended without a report"
    printed = collections.deque([""], maxlen=30)    # the last lines
    with (open(log, "wb", buffering=0) as file,
          process_group([*command, "--key", key], **variables) as process):
        async for line in lines_of(process):
            # No time passes while the driver stands still, as after Ctrl-Z.
            before, now = now, time.monotonic()
            patience -= min(now - before, 1.0)
            if patience < 0 or file.tell() > LOG_LIMIT:
                cause = "timeout" if patience < 0 else "flooded its log"
                break
            # Only prepare.py prints the key, and then an event.
            words, _, payload = line.partition(key.encode())
            if words.strip():
                file.write(words + b"\n")
                printed.append(one_line(str(words, "utf-8", "replace"), 200))
            try:
                event = json.loads(payload)
            except ValueError:      # it has no event, or a damaged one
                continue
            if "limit" in event:
                phase, patience = f"in {event['event']}", event["limit"]
            on_event(event, printed[-1][:80])
    code = process.returncode
    if event.get("event") == "report" and code == 0:    # it counts only after a normal end
        if all(isinstance(event.get(n), (int, float)) and math.isfinite(event[n]) for n in NEEDED):
            return event
        cause = f"no finite number for each of {NEEDED}"
    how = "signal 9 (out of memory?)" if code == -signal.SIGKILL else f"code {code}"
    reason = event.get("reason") or f"{cause}, {phase}, by {how}: {printed[-1][:80]}"
    raise Unusable(one_line(reason), "\n".join(printed).strip(), started=bool(event))


async def lines_of(process: subprocess.Popen) -> AsyncIterator[bytes]:
    """Yield what a process prints, line by line, until it ends; b"" while it prints nothing."""
    os.set_blocking(process.stdout.fileno(), False)
    chunk, rest, has_ended = b"", b"", False
    while chunk or not has_ended:   # a child that holds the pipe open is not waited for
        has_ended = process.poll() is not None      # asked before the read, so nothing is lost
        chunk = process.stdout.read(1 << 16) or b""
        *lines, rest = re.split(b"[\r\n]", rest + chunk)
        if len(rest) > 1 << 16:     # the end of such a line may never come
            lines, rest = [*lines, rest], b""
        for line in lines or [b""]:
            yield line
        await asyncio.sleep(0 if chunk else 0.05)
    yield rest


@contextlib.contextmanager
def process_group(command: list[str], **variables: str) -> Iterator[subprocess.Popen]:
    """Start a command; at the end of the block, end it and all that it has started.

    Its environment is ours without anything that looks like a secret, and with the variables.
    """
    secret = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|JWT|_PAT$|API_BASE|BASE_URL", re.I)
    ours = {name: value for name, value in os.environ.items() if not secret.search(name)}
    unbuffered = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
    with subprocess.Popen(command, env=ours | unbuffered | variables, start_new_session=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, bufsize=0) as process:
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(b"\n")     # "a driver is here": a run ends when this pipe does
            yield process
        finally:
            for number in signal.SIGTERM, signal.SIGKILL:
                # OSError: none of them is left.
                with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(GRACE)


# ---- 6  LLM: a client over raw HTTP, and one class for each wire format that it speaks ----------
Answer = collections.namedtuple(    # complete: neither cut off nor empty
    "Answer", "text complete finish_reason input_tokens output_tokens raw")


class Away(Exception):
    """The LLM gives no answer now: (the reason, whether the prompt is too long)."""


class LLM:
    """A model behind an endpoint."""

    def __init__(self, base_url: str | None, model: str | None):
        self.format = form = find_format(base_url, model)
        url = base_url or next(filter(None, map(os.environ.get, form.urls)), form.home)
        url = re.sub("//[^/]*@", "//", url.strip("\"' \r\n/"))      # without a password
        if not url.startswith(("http://", "https://")):
            raise Stop(f"{url} has to begin with http:// or https://")
        self.url = url.removesuffix(form.path).removesuffix(form.version) + form.version
        self.model = model or (form.model if self.url == form.home else "")
        self.key_from = next(filter(os.environ.get, reversed(form.keys)), "no key")    # token first
        self.key = re.sub("[\"']|[^!-~]", "", os.environ.get(self.key_from, "")) or "no-key"
        name, prefix = form.keys.get(self.key_from, ("Authorization", "Bearer "))
        self.headers = form.headers | {name: prefix + self.key}

    def greet(self) -> str:
        """Check the key, take the only model if none was named, and tell who is asked."""
        try:
            names = self.http("/models", None, lambda data: [
                one.get("id") or one["name"] for one in data.get("data") or data["models"]])
        except Away as absence:     # not every server has /models; then --model is needed
            if not self.model or re.match("HTTP 40[13]", absence.args[0]):
                raise Stop(f"{absence.args[0]}: see to the key, --model, --base-url") from None
        if not self.model and len(names) != 1:
            raise Stop(one_line(f"choose a --model of {self.url}: {names}", 1000))
        self.model = self.model or names[0]
        return f"researcher  {self.model} at {self.url} ({self.key_from}); it may cost money"

    def ask(self, prompt: list[str], turns: list[str]) -> Answer:
        """Send a prompt and the turns since then: reply, complaint, reply, ..."""
        chat = [{"role": "user", "content": "".join(prompt[1:])}]
        for n, text in enumerate(turns):
            chat.append({"role": "user" if n % 2 else "assistant", "content": text})
        path = self.format.path.format(model=self.model)    # some formats have the model there
        return self.http(path, self.format.body(self.model, prompt, chat), self.read)

    def read(self, data: dict) -> Answer:
        """Return the Answer in a response."""
        content, reason, usage = self.format.read(data)
        parts = content if isinstance(content, list) else [{"text": content}]
        text = "".join(part.get("text") or "" for part in parts)    # a thought has none
        text = text.encode("utf-8", "replace").decode()     # a lone surrogate becomes "?"
        reason = str(reason or "stop").lower()
        ended = reason in ("stop", "end_turn", "stop_sequence", "eos", "eos_token")
        got, *sent = [int((usage or {}).get(name) or 0) for name in self.format.counts]
        return Answer(text, ended and bool(text.strip()), reason, sum(sent), got, data)

    def http(self, path: str, body: dict | None, parse: Callable) -> object:
        """Return what parse() makes of the answer. Without a body, it is a GET."""
        try:
            response = requests.request(
                "POST" if body else "GET", self.url + path, json=body,
                headers=self.headers, auth=lambda request: request,     # no password from ~/.netrc
                allow_redirects=False,      # a redirect may take the key elsewhere
                timeout=(10, 1800 if body else 30))     # a local model may need half an hour
        except Exception as problem:
            raise Away(one_line(f"no answer from {self.url}: {problem}"), False) from None
        code, text = response.status_code, response.content.decode("utf-8-sig", "replace")
        with contextlib.suppress(Exception):    # an error has not what parse() needs
            return parse(json.loads(text))
        problem = f"HTTP {code} from {self.url}{path}: {text}".replace(self.key, "KEY")
        long = code in (400, 422, 500) and re.search(r"(?i)context.(length|size)|\btokens", text)
        raise Away(one_line(problem), code == 413 or bool(long))


class OpenAI:
    """OpenAI's chat completions, which most servers offer."""

    home, version, path = "https://api.openai.com/v1", "", "/chat/completions"
    model = "gpt-5.5"           # as of 2026-11-25
    own = r"^(gpt-\d|o\d)"      # names of models, or URLs, that only this format has
    urls = "OPENAI_BASE_URL", "OPENAI_API_BASE"
    keys = {"OPENAI_API_KEY": ("Authorization", "Bearer ")}     # variable: header, prefix
    headers = {}
    counts = "completion_tokens", "prompt_tokens"   # of a reply, and of what makes up a prompt

    def body(self, model: str, prompt: list[str], chat: list[dict]) -> dict:
        return {"model": model, "messages": [{"role": "system", "content": prompt[0]}, *chat]}

    def read(self, data: dict) -> tuple:
        """Return the text, or parts of it; why it ended; and a dict with the `counts`."""
        choice = data["choices"][0]
        message = choice["message"]
        text = message.get("content") or message.get("reasoning_content")
        return text, choice.get("finish_reason"), data.get("usage")


class Anthropic:
    """Anthropic's messages. A third format is one more class in FORMATS."""

    home, version, path = "https://api.anthropic.com/v1", "/v1", "/messages"
    model = "claude-sonnet-5-5"     # as of 2026-11-25
    own = r"^claude|//api\.anthropic\.com|\w/anthropic(/|$)"
    urls = ["ANTHROPIC_BASE_URL"]
    keys = {"ANTHROPIC_API_KEY": ("x-api-key", ""),
            "ANTHROPIC_AUTH_TOKEN": ("Authorization", "Bearer ")}
    headers = {"anthropic-version": "2023-06-01"}
    counts = ("output_tokens", "input_tokens",
              "cache_creation_input_tokens", "cache_read_input_tokens")

    def body(self, model: str, prompt: list[str], chat: list[dict]) -> dict:
        parts = [{"type": "text", "text": text} for text in prompt[1:]]
        # All but the last part is cached.
        parts[-2]["cache_control"] = {"type": "ephemeral", "ttl": "1h"}
        chat[0]["content"] = parts
        return {"model": model, "system": prompt[0], "messages": chat, "max_tokens": 32_000}

    def read(self, data: dict) -> tuple:
        return data["content"], data.get("stop_reason"), data.get("usage")


# If keys of both are set, the first is asked. An unknown --base-url speaks the last's format.
FORMATS = Anthropic(), OpenAI()
CONNECT = ", ".join(name for form in FORMATS for name in form.keys) + " or --base-url"


def find_format(base_url: str | None, model: str | None = None) -> object | None:
    """Return the one of FORMATS that the flags and variables ask for, or None."""
    fits = [form for form in FORMATS if re.search(form.own, base_url or model or "")]
    if base_url:
        return (fits or FORMATS)[-1]
    # What fits the model's name goes first, then what has a URL, then what has a key.
    ready = [form for form in FORMATS if any(map(os.environ.get, (*form.urls, *form.keys)))]
    with_url = [form for form in ready if any(map(os.environ.get, form.urls))]
    return next((form for form in fits + with_url + ready if form in ready), None)


# ---- 7  Reply: from the words of an LLM to the source of a candidate ----------------------------
TAG = r"[\w:]*(?:think|thought|reason)\w*[>\]▷]"    # "think>" of "</think>"
MARK = re.compile(r"(?m)^[ \d.)*`-]*([<=>])\1{4}.*\n?")     # "2. <<<<<<< SEARCH"
FENCE = re.compile(r"(?m)^ *(?:```|~~~).*\n?")  # "```python"
WHOLE_FILE = re.compile(r"(?ms)^(import|from) [^\n]*prepare.*^def train\(")
DESCRIPTION = re.compile(r"(?im)^[^a-z\n]*description[\s:*_`-]*(.+)")   # "**Description**: wider"
CHOICE = re.compile(r"(?im)^[^a-z\n]*(description|or|option|alternative\w*)\b")     # "## Option B"
COMMENT = re.compile(r"(?m)(?<=\S)[ \t]+(#.*)?$")   # "    # layers"
# "# ... the rest of the file", "pass  # as before", but not "x[0, ...]"
LEFT_OUT = re.compile(r"(?i)(?<!, )\.\.\.|…|\b((existing|remaining) code|as (above|before|is)|"
                      r"no changes?|omitted|rest of|same as|unchanged|untouched)\b")


def apply_reply(reply: str, source: str) -> tuple[str, str]:
    """Return (description, new source), for tests and tools. Raises Unusable: it never guesses."""
    description, _, blocks = read_reply(reply, source)
    return description, edited(source, blocks)


def read_reply(reply: str, source: str) -> tuple[str, str, list[tuple[str, str]]]:
    """Return (description, why, [(SEARCH, REPLACE), ...]). A whole file replaces the source."""
    # A reply begins after "</think>" or gpt-oss's "final<|message|>" or "assistantfinal".
    text = re.split(rf"(?i)[<\[◁]/{TAG}|final<\|message\|>|assistantfinal", reply)[-1]
    text = re.split(rf"(?im)^[<\[◁]{TAG}", text)[0]       # thoughts without an end
    text = "\n".join(line.rstrip() for line in text.replace("\xa0", " ").split("\n"))
    text = re.sub(r"(?m)^[ \t]+", lambda blanks: blanks[0].expandtabs(4), text)
    parts = MARK.split(text)    # prose, "<", SEARCH, "=", REPLACE, ">", prose, "<", ...
    texts, marks = parts[::2], "".join(parts[1::2])
    blocks = list(zip(texts[1::3], texts[2::3]))
    files = list(filter(WHOLE_FILE.search, FENCE.split(text)[1:-1]))
    between = "\n".join(texts[3:-1:3])
    if len(files) == 1 and "<" not in marks:
        blocks = [(source, files[0])]
    elif files or not blocks or marks != "<=>" * len(blocks) or CHOICE.search(between):
        raise Unusable("give one proposal, in the form asked for")
    said = DESCRIPTION.search(texts[0])
    why = texts[0][said.end() if said else 0:].partition("```")[0]
    name = one_line(said[1].strip("*_` ") if said else why, 120)
    return name or "no description", one_line(why, 500), blocks


def edited(source: str, blocks: list[tuple[str, str]]) -> str:
    """Return the source with all blocks applied. Raises Unusable, also if their order matters."""
    new = functools.reduce(replaced, blocks, source)
    if new != functools.reduce(replaced, blocks[::-1], source):
        raise Unusable("the order of the blocks matters: make them one")
    known = source.split("\n")
    for line in new.split("\n"):
        code = line.partition("#")[0].strip(" .…[]")
        if code in ("", "pass") and LEFT_OUT.search(line) and line not in known:
            raise Unusable(f"write the code that this line stands for: {line}")
    if code_in(new) == code_in(source):
        raise Unusable("it changes nothing, or only comments")
    return new


def replaced(source: str, block: tuple[str, str]) -> str:
    """Return the source after one block, whose SEARCH has to fit at one place."""
    search, replace = (part.strip("\n") for part in block)
    lines, n = source.split("\n"), search.count("\n") + 1
    places = ["\n".join(lines[i:i + n]) for i in range(len(lines) - n + 1)]
    if search not in places:    # its comments and its depth may differ
        both = textwrap.dedent(f"{search}\n{replace}").split("\n")
        search, replace = COMMENT.sub("", "\n".join(both[:n])), "\n".join(both[n:])
        places = [COMMENT.sub("", textwrap.dedent(place)) for place in places]
    if (fits := places.count(search)) != 1 or not search:
        raise Unusable(f"SEARCH fits at {fits} places once the other blocks are in:\n{block[0]}")
    at = places.index(search)       # where the code may be deeper; then REPLACE moves with it
    margin = re.match(r"\s*", lines[at])[0].removesuffix(re.match(r"\s*", search)[0])
    lines[at:at + n] = [textwrap.indent(replace, margin)]
    return "\n".join(lines)


def code_in(source: str) -> str:
    """Return a program without comments, docstrings and formatting. Raises Unusable."""
    try:
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(body := getattr(node, "body", None), list):
                node.body = [line for line in body if not isinstance(line, ast.Expr)
                             or not isinstance(line.value, ast.Constant)]
        return ast.unparse(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Unusable(f"it does not parse: {error}: {getattr(error, 'text', '')}") from None


# ---- 8  Search: proposals that need no LLM ------------------------------------------------------
NUMBER = r"2 \*\* \d\d?|(?:0|[1-9]\d{,8})(?:\.\d+)?(?:e-\d\d?)?"
# "DEPTH = 9 if CUDA else 1    # layers"
KNOB = re.compile(rf"(?m)^([A-Z][A-Z\d_]*) = (?P<number>{NUMBER})"
                  rf"(?: if CUDA else (?P<other>{NUMBER}))? *(?:#.*)?$")


def random_moves(rng: random.Random, source: str, cuda: bool) -> Iterator[tuple[str, str]]:
    """Yield (description, changed source), up to 200: at times two or three knobs move."""
    knobs = {knob[1]: knob.span("other" if knob["other"] and not cuda else "number")
             for knob in KNOB.finditer(source)}
    for _ in range(200 if knobs else 0):
        text, moves = source, []
        chosen = rng.sample(list(knobs), min(len(knobs), rng.choice((1, 1, 1, 2, 2, 3))))
        for name in sorted(chosen, key=knobs.get, reverse=True):    # last first: spans stay valid
            start, end = knobs[name]
            old = eval(source[start:end])       # KNOB lets only numbers through
            new = moved(old, math.exp(rng.choice((-1, 1)) * rng.uniform(0.2, 0.8)))
            if old and new != old:
                text = text[:start] + repr(new) + text[end:]
                moves.append(f"{name} {old!r} -> {new!r}")
        if moves:
            yield ", ".join(moves), text


def moved(value: float, factor: float) -> float:
    """Return a knob's value times factor, as far as its kind allows."""
    if isinstance(value, int) and value > 2 and value.bit_count() == 1:
        return value * 2 if factor > 1 else value // 2  # a power of two remains one
    if isinstance(value, int):
        return max(1, round(value * factor))
    if value < 1:       # a share p stays below 1: p / (1 - p) is multiplied
        factor /= 1 - value + value * factor
    return float(f"{value * factor:.4g}")


# ---- 9  Files: the ledger, experiment.json, git -------------------------------------------------
TRAIN = Path("train.py")
PROGRAM = Path("program.md")
LEDGER = Path("results.tsv")
PLOT = Path("progress.svg")
FOLDER = Path("runs")
LOG = FOLDER / "log.txt"
CONDITIONS = FOLDER / "conditions.json"
CONFIRMED = FOLDER / "confirmed.json"
BEGIN_ANEW = f"d=old/$(date +%s); mkdir -p $d; mv {LEDGER} {FOLDER} {PLOT} $d; git checkout {TRAIN}"
MUST_NOT_CHANGE = "data sha256 device threads torch budget seq_len vocab_size prepare judge".split()
COLUMNS = ("commit val_bpb memory_gb status description experiment by runs test_bpb reason "
           "train_seconds total_seconds input_tokens output_tokens finished").split()


def row_of(exp: Experiment) -> str:
    """Return the row of results.tsv for a judged experiment; a crash has 0 for its results."""
    runs = exp.runs[:exp.counted]
    shown = [dict.fromkeys(NEEDED, 0)] if exp.status == "crash" else runs
    val, test, train, total, memory = ([run[name] for run in shown] for name in NEEDED)
    row = vars(exp) | {
        "commit": exp.commit or exp.fingerprint[:7] or "0000000", "experiment": exp.number,
        "val_bpb": f"{score(val):.6f}", "runs": ",".join(f"{run['val_bpb']:.6f}" for run in runs),
        "test_bpb": f"{score(test):.6f}", "memory_gb": f"{max(memory) / 1000:.1f}",
        "train_seconds": f"{sum(train):.1f}", "total_seconds": f"{sum(total):.1f}"}
    return "\t".join(str(row[name]) for name in COLUMNS)


def mend_ledger(judged: list[Experiment]):
    """Make results.tsv agree with runs/, which has the truth. A first start writes the header."""
    mended = "".join(f"{row}\n" for row in ["\t".join(COLUMNS), *map(row_of, judged)])
    text = read(LEDGER) if LEDGER.exists() else ""
    if text.count("\n") > mended.count("\n"):
        raise Stop(f"{LEDGER} has more lines than {FOLDER}/ has verdicts; begin anew: {BEGIN_ANEW}")
    if text not in ("", mended):
        write_whole(LEDGER.with_suffix(".old"), text)
        say(f"{LEDGER} did not agree with {FOLDER}/ and is mended; results.old is as it was")
    write_whole(LEDGER, mended)


def saved_experiments() -> Iterator[Experiment]:
    """Yield the experiments in runs/, oldest first. One line names what cannot be read."""
    for path in sorted(FOLDER.glob("*/experiment.json")):
        try:
            yield Experiment(**json.loads(read(path)))
        except (OSError, ValueError, TypeError) as error:
            say(f"{path} is skipped, and its folder stays as it is: {one_line(str(error), 100)}")


def read_json(path: Path) -> dict:
    """Return the data in a file; {} if there is no such file."""
    try:
        return dict(json.loads(read(path))) if path.exists() else {}
    except (ValueError, TypeError):
        raise Stop(f"{path} is damaged: put a copy back, or begin anew: {BEGIN_ANEW}") from None


def read(path: Path) -> str:
    """Return a file's text. What is not UTF-8 in it is kept, and written as it was."""
    return path.read_bytes().decode("utf-8", "surrogateescape")


def write_whole(path: Path, content: str | dict):
    """Write text, or data as JSON. After a kill the file is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(content if isinstance(content, str) else json.dumps(content, indent=1))
        file.flush()
        os.fsync(file.fileno())     # else a power failure may leave the new name without content
    os.replace(temporary, path)


def git_commit(description: str, reason: str) -> str:
    """Commit train.py alone, on a branch autoresearch/... only. Return its name, or ""."""
    def git(words: str) -> str:     # without hooks: they may ask, and nobody is there at night
        return subprocess.getoutput(f"git -c core.hooksPath=/dev/null {words}", errors="replace")
    if git("branch --show-current").startswith("autoresearch/"):
        message = shlex.quote(f"{description}\n\n{reason}")
        said = git(f"commit --no-gpg-sign -m {message} -- {TRAIN}")
        if git(f"rev-parse HEAD:./{TRAIN}") == git(f"hash-object {TRAIN}"):
            return git(f"log -1 --format=%h --abbrev=7 -- {TRAIN}")  # or made before a kill
        say(f"{TRAIN} was not committed, and the night goes on: {one_line(said)}")
    return ""


def one_line(text: str, limit: int = 300) -> str:
    """Return text as one line without control characters, tabs or double quotes, cut at limit."""
    line = "".join(filter(str.isprintable, " ".join(text.split()))).replace('"', "'")
    return line if len(line) <= limit else line[:limit - 3] + "..."


# ---- 10  Show: the verdict, the summary, the picture, the live line -----------------------------
WIDTH, HEIGHT, LINE = 630, 180, 22      # of the stairs in the picture, and of a line of text
UNIT = "bits per byte"      # of val_bpb; another task has another
TEXT = '<text x="{}" y="{}" class="{}">{}</text>'
LEGEND = "val_bpb by experiment, lower is better; blue: llm, orange: search, green: human"
STYLE = """<style> text:first-of-type {font-size: 26px} .end {text-anchor: end}
svg {font: 17px sans-serif; color-scheme: light dark; background: Canvas; fill: currentColor}
path {fill: none; stroke: currentColor; stroke-width: 3px} rect {opacity: 0.2}
circle {r: 4px; opacity: 0.4} .keep {r: 6px; opacity: 1}
.llm {color: #1f87d6} .search {color: #d55e00} .human {color: #009e73} </style>"""


def line_of(exp: Experiment) -> str:
    """Return an experiment's line in the terminal."""
    bpb = "no score" if exp.status == "crash" else f"{score(exp.scores):.6f}"
    return f"#{exp.number:<4} {exp.by:8} {bpb}  {exp.status:7}  {exp.description}  [{exp.reason}]"


def kept(experiments: list[Experiment]) -> list[Experiment]:
    return [exp for exp in experiments if exp.status == "keep"]


def summary(judged: list, confirmed: dict, budget: float) -> list[str]:
    """Return the night in lines: what it gained, and what it took."""
    lines, keeps = ["nothing better than the baseline was kept"], kept(judged)
    if len(keeps) > 1:
        old, new = keeps[0].scores, keeps[-1].scores
        lines = [f"{score(old):.3f} to {score(new):.3f} {UNIT}"]
        # The runs of the night flatter what they chose. Fresh ones take their place.
        error = standard_error(len(old), len(new), noise_of(judged)) or math.nan
        selected = {"budget": budget, "gain": score(old) - score(new), "error": error, "n": 0}
        claims = {f"{budget:g}": selected} | {name: claim for name, claim in confirmed.items()
                                              if claim["incumbent"] == keeps[-1].number}
        for claim in claims.values():
            gain = "gain at {budget:g} s {gain:+.4f} ± {error:.4f}".format(**claim)
            fresh = f"confirmed on {claim['n']} fresh seeds"
            lines.append(f"{gain}, {fresh if claim['n'] else 'as selected (see --confirm)'}")
    if keeps and "did" in keeps[-1].runs[-1]:
        lines.append(f"the incumbent's newest run: {keeps[-1].runs[-1]['did']}")
    counts = collections.Counter(exp.status for exp in judged[1:])
    minutes = sum(run["total_seconds"] for exp in judged for run in exp.runs) / 60
    sent = sum(exp.input_tokens for exp in judged)
    got = sum(exp.output_tokens for exp in judged)
    return [*lines, f"{counts.total()} experiments: {counts['keep']} kept, {counts['discard']} "
                    f"discarded, {counts['crash']} crashed",
            f"{minutes:,.0f} minutes; tokens: {sent:,} in, {got:,} out"]


def progress_svg(judged: list, confirmed: dict, budget: float, *controls: list) -> str:
    """Return the night as a picture; `controls` are other nights, drawn beside it."""
    lines = [*summary(judged, confirmed, budget), LEGEND]
    top = -LINE * len(lines) - 46
    tall = HEIGHT + 30 - top
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-70 {top} 720 {tall}">', STYLE]
    for i, line in enumerate(lines):
        svg.append(TEXT.format(-58, top + 30 + LINE * i, "", html.escape(line)))
    nights = [*controls, judged]
    levels = [score(exp.scores) for night in nights for exp in kept(night)]
    high = max(levels)
    span = max(high - min(levels), 10 * noise_of(judged), 0.01)   # noise must not fill it
    for y in range(0, HEIGHT + 1, HEIGHT // 4):
        svg.append(f'<rect y="{y}" width="{WIDTH}" height="1"/>')
        svg.append(TEXT.format(-8, y + 6, "end", f"{high - y / HEIGHT * span:.3f}"))
    for night in nights:
        stairs, room = "M0 0", LINE     # where the next name has room
        for i, exp in enumerate(night):
            x = i * WIDTH // (max(*map(len, nights), 2) - 1)
            y = (high - score(exp.scores)) / span * HEIGHT
            y = round(min(max(-LINE, y), HEIGHT + LINE))    # -LINE also for the nan of a crash
            svg.append(f'<circle class="{exp.by} {exp.status}" cx="{x}" cy="{y}"/>')
            if exp.status == "keep":
                stairs += f"H{x}V{y}"
            if exp.status == "keep" and y >= room:
                room = y + LINE
                place = (x + 8, y - 10, "") if x < WIDTH / 2 else (x - 8, y + LINE, "end")
                name = one_line(f"#{exp.number} {exp.description}", 24)
                svg.append(TEXT.format(*place, html.escape(name)))
        svg.append(f'<path class="{mode(exp.by for exp in kept(night)[::-1])}" d="{stairs}H{x}"/>')
    return "\n".join([*svg, "</svg>"])


def say(line: str):
    """Print a line in the place of the live one, and append it to runs/log.txt."""
    write_log(line)
    try:
        show("")    # clears the live line
        sys.stdout.reconfigure(errors="replace")    # not every terminal has Unicode
        print(line, flush=True)
    except (AttributeError, OSError, ValueError):   # the terminal is gone, the log is not
        sys.stdout = open(os.devnull, "w")


def show(line: str):
    """Redraw the live line, in a terminal, which cuts it at its right edge."""
    if sys.stdout.isatty():
        with contextlib.suppress(OSError):  # say() will notice that it is gone
            print(f"\r\033[K\033[?7l{line}\033[?7h", end="", flush=True)


def write_log(line: str):
    with contextlib.suppress(OSError), open(LOG, "ab", 0) as log:   # the disk may be full
        log.write(f"{time.strftime('%F %T')} {line}\n".encode(errors="replace"))


# ---- 11  Command line ---------------------------------------------------------------------------
def main() -> int | str:
    """Return the exit code, or what went wrong: sys.exit() prints that and ends with code 1."""
    lab, result = None, 0
    try:
        args = parse_arguments()
        os.chdir(Path(__file__).resolve().parent)
        if args.experiments != 0:
            lock_folder()
        lab = Lab(args)
        if args.experiments != 0:
            asyncio.run(until_signal(lab.night()))
    except (asyncio.CancelledError, KeyboardInterrupt) as stop:
        number = stop.args[0] if stop.args else signal.SIGINT   # until_signal() put it there
        say(f"stopped by {signal.Signals(number).name}")
        result = 128 + number
    except Stop as reason:
        result = f"autoresearch.py: {reason}"
    except Unusable as problem:         # the baseline has no train(), for example
        result = f"{TRAIN}: {problem.reason}: mend it, or git checkout {TRAIN}; see {FOLDER}/"
    except Exception as error:          # the disk is full, for example, or this file has a fault
        write_log(traceback.format_exc())
        result = f"{type(error).__name__}: {error}; what was logged is safe; {LOG} has the details"
    if lab:
        lines = summary(lab.judged, lab.confirmed, lab.conditions.get("budget", 0))
        say("\n".join([*map(line_of, kept(lab.judged)), *lines]))
    write_log(f"ended: {result}")
    return result


async def until_signal(work: Coroutine):
    """Do the work. The first signal cancels it, and CancelledError holds the signal's number."""
    for sig in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        if signal.getsignal(sig) != signal.SIG_IGN:     # nohup wants to outlive its terminal
            asyncio.get_running_loop().add_signal_handler(sig, asyncio.current_task().cancel, sig)
    await work


async def environments(args: argparse.Namespace) -> list[dict[str, str]]:
    """Return the variables for the runs on each accelerator: its GPU, its share of the cores."""
    if args.workers == 1 or args.launch:
        return [{}] * args.workers
    gpus = re.split(", ?", await ask_prepare("--devices", answer=r"[\w/-]+(, ?[\w/-]+)*"))
    cores = str(os.cpu_count() // args.workers or 1)
    return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)], "OMP_NUM_THREADS": cores,
             "TORCHINDUCTOR_COMPILE_THREADS": cores} for i in range(args.workers)]


async def ask_prepare(*flags: str, answer: str = ".+") -> str:
    """Run prepare.py, which has torch and the data. Return its last line that fits `answer`."""
    lines = ["prepare.py ended without a word"]
    with process_group([sys.executable, "prepare.py", *flags]) as process:
        async for line in lines_of(process):
            if text := line.decode("utf-8", "surrogateescape").rstrip():
                lines.append(text)
                say(text)
    if process.returncode:
        raise Stop(lines[-1])
    return next((line for line in reversed(lines) if re.fullmatch(answer, line)), "")


def lock_folder():
    """Refuse a second driver in this folder."""
    FOLDER.mkdir(exist_ok=True)
    file = os.open(FOLDER / "lock", os.O_WRONLY | os.O_CREAT)       # it stays open until we end
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Stop("another driver works in this folder: stop it, or use a copy") from None
    except OSError:
        say("WARNING: this file system has no locks: start no second driver in this folder")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--experiments", type=int, metavar="N", help="stop after N (default: go on; 0: summary)")
    add("--budget", type=float, metavar="SECONDS", help="training time of a run")
    add("--researcher", choices=("llm", "search"), help="default: llm if one is configured")
    add("--model", help="the LLM's name")
    add("--base-url", metavar="URL", help="of the LLM's endpoint")
    add("--tokens", type=int, metavar="N", help="ask the LLM no more once N are used, in and out")
    add("--workers", type=int, default=1, metavar="N", help="experiments at a time (1)")
    add("--launch", type=shlex.split, default=[], metavar="PREFIX", help="before a run's command")
    add("--data", metavar="NAME|PATH", help="python, stdlib, tinystories, c4[:SHARDS], or a path")
    add("--confirm", type=int, metavar="N", help="run baseline and incumbent N times each")
    args = parser.parse_args()
    least = {"experiments": 0, "budget": 0.1, "tokens": 1, "workers": 1, "confirm": 1}
    for flag, value in vars(args).items():
        if flag in least and value is not None and not least[flag] <= value < math.inf:
            parser.error(f"--{flag} has to be at least {least[flag]}")
    if args.researcher == "llm" and not find_format(args.base_url):
        parser.error(f"--researcher llm needs {CONNECT}")
    args.researcher = args.researcher or ("llm" if find_format(args.base_url) else "search")
    return args


if __name__ == "__main__":
    sys.exit(main())
