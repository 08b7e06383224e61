"""Parts of an operation that all threads work on, one after the other.

Starting a parallel task costs some microseconds, so an operation starts one and goes through phases in it. A
thread takes pieces of a phase as long as there are some, and waits only for pieces that others are at work on,
so one that comes late holds up no phase.
"""
from std.atomic import Atomic
from std.ffi import external_call

comptime Floats = MutPointer[Float32, MutUntrackedOrigin]
comptime Bytes = MutPointer[UInt8, MutUntrackedOrigin]
comptime Integers = MutPointer[Int32, MutUntrackedOrigin]

comptime _LINE = 8
# Of each phase what is taken and what is done, in cache lines of their own.
comptime _PATIENCE = 4096
"""How often a thread looks whether a phase is done before it lets others run."""
comptime MOST = 16
"""Phases of one operation."""
comptime COUNTERS = MOST * 2 * _LINE
"""Numbers that the counters of an operation take."""


struct Phases(ImplicitlyCopyable):
    """The phases of one operation, as a thread sees them."""

    var counters: MutPointer[Int64, MutUntrackedOrigin]
    var tasks: Int

    def __init__(out self, counters: MutPointer[Int64, _], tasks: Int):
        """Begins with counters that are all 0."""
        self.counters = counters.unsafe_origin_cast[MutUntrackedOrigin]()
        self.tasks = tasks
        for i in range(COUNTERS):
            self.counters.unsafe_store(i, 0)

    @always_inline
    def share[Body: def(Int) -> None](self, phase: Int, count: Int, body: Body):
        """Runs `body` for 0 to `count` - 1, each in one of the threads that come here; all are done behind it."""
        var taken = self.counters.unsafe_offset(2 * _LINE * phase)
        var done = taken.unsafe_offset(_LINE)
        var mine = Int64(0)
        while True:
            var i = Int(Atomic[Int64].fetch_add(taken, 1))
            if i >= count:
                break
            body(i)
            mine += 1
        if mine > 0:
            _ = Atomic[Int64].fetch_add(done, mine)
        var looked = 0
        while Atomic[Int64].load(done) < Int64(count):
            looked += 1
            if looked == _PATIENCE:
                # Whoever is at work may need this processor.
                _ = external_call["sched_yield", Int32]()
                looked = 0
