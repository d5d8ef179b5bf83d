#define _GNU_SOURCE
#include "crew.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

// The state of a run in one word, so that taking a task is one compare-and-swap that fails if anything has changed: the
// serial number of the open node (over all runs; it wraps), its tasks, and how many of them are taken. Between runs
// there are no tasks.
union state {
	uint64_t word;
	struct {
		uint16_t taken, tasks;
		uint32_t serial;
	};
};

struct hone_crew {
	_Atomic uint64_t state __attribute__((aligned(64)));
	_Atomic int done __attribute__((aligned(64))); // tasks of the open node
	_Atomic int sleepers;
	_Atomic int stop, quit;

	// Of the run; written before the state that opens a node, read by those who have a task of it.
	struct ggml_tensor **nodes;
	int n, at;
	bool stopped;
	int64_t *times, opened;

	clockid_t clock; // of times

	int threads;
	pthread_t helpers[];
};

// Threads that wait look this often before they sleep: about 30 microseconds, several times what one of a node's last
// tasks takes while a token is computed.
enum { SPINS = 600 };

static void relax(void) {
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

static void futex_wait(_Atomic uint32_t *at, uint32_t value) { syscall(SYS_futex, at, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0); }
static void futex_wake(_Atomic uint32_t *at) { syscall(SYS_futex, at, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0); }

static _Atomic uint32_t *serial_of(struct hone_crew *c) { return (_Atomic uint32_t *)((char *)&c->state + offsetof(union state, serial)); }

static int64_t now(clockid_t clock) {
	struct timespec t;
	clock_gettime(clock, &t);
	return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int tasks_of(const struct ggml_tensor *node) {
	int tasks = node->op_params[HONE_TASKS];
	if (tasks == HONE_TASKS_OF_SOURCE) {
		const struct ggml_tensor *last = NULL;
		for (int i = 0; i < 10 && node->src[i]; i++) last = node->src[i];
		tasks = *(const int32_t *)last->data;
	}
	return tasks < UINT16_MAX ? tasks : UINT16_MAX;
}

// open_node lets the threads take the tasks of the node at c->at or, if it has none, of the next one that has; behind the
// last one, the run ends.
static void open_node(struct hone_crew *c) {
	union state s = {.word = atomic_load(&c->state)};
	s.serial++;
	s.taken = s.tasks = 0;
	if (c->times) c->opened = now(c->clock);
	for (; c->at < c->n && !atomic_load_explicit(&c->stop, memory_order_relaxed); c->at++)
		if ((s.tasks = tasks_of(c->nodes[c->at])) > 0) break;
	c->stopped = c->at < c->n && s.tasks == 0;
	atomic_store_explicit(&c->done, 0, memory_order_relaxed);
	atomic_store(&c->state, s.word); // from here on, a run that has ended may be followed by another
	if (s.tasks != 1 && atomic_load(&c->sleepers) > 0) futex_wake(serial_of(c));
}

// take computes one task, if there is one.
static void take(struct hone_crew *c, union state s) {
	union state mine = s;
	mine.taken++;
	if (s.taken >= s.tasks || !atomic_compare_exchange_strong(&c->state, &s.word, mine.word)) return;
	struct ggml_tensor *node = c->nodes[c->at];
	ggml_custom_op_t fun;
	memcpy(&fun, node->op_params, sizeof fun); // as ggml's own custom parameters begin
	fun(node, s.taken, s.tasks, NULL);
	if (atomic_fetch_add(&c->done, 1) + 1 == s.tasks) {
		if (c->times) c->times[c->at] += now(c->clock) - c->opened;
		c->at++;
		open_node(c);
	}
}

// A thread that never gives way is stopped where the system's slice of time ends, inside a task more often than not, and
// all wait for it as long as the other process has the core. So it gives way by itself, between two tasks, before
// the slice is over.
enum { GIVE_WAY = 2000 * 1000 }; // nanoseconds: half of a tick of Linux at 250 Hz, less than a slice at 1000

// work takes tasks until the run is over, or as a helper until the crew is.
static void work(struct hone_crew *c, bool helper) {
	int64_t since = now(CLOCK_MONOTONIC);
	for (int spins = 0;;) {
		union state s = {.word = atomic_load(&c->state)};
		if (helper ? atomic_load(&c->quit) : s.tasks == 0) return;
		if (s.taken < s.tasks) {
			take(c, s);
			spins = 0;
			if (now(CLOCK_MONOTONIC) - since > GIVE_WAY) {
				sched_yield();
				since = now(CLOCK_MONOTONIC);
			}
		} else if (spins++ < SPINS) {
			relax();
		} else {
			// Whoever opens a node looks for sleepers afterwards, and the system compares the serial number again.
			atomic_fetch_add(&c->sleepers, 1);
			union state seen = {.word = atomic_load(&c->state)};
			if (seen.serial == s.serial && !(helper && atomic_load(&c->quit))) futex_wait(serial_of(c), s.serial);
			atomic_fetch_sub(&c->sleepers, 1);
			spins = 0;
			since = now(CLOCK_MONOTONIC);
		}
	}
}

static void *help(void *crew) {
	work(crew, true);
	return NULL;
}

struct hone_crew *hone_crew_new(int threads) {
	struct hone_crew *c = aligned_alloc(64, (sizeof *c + threads * sizeof(pthread_t) + 63) / 64 * 64);
	if (!c) return NULL;
	memset(c, 0, sizeof *c);
	c->threads = 1;
	// Signals are for the threads of the program.
	sigset_t all, before;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	for (int i = 1; i < threads; i++) {
		if (pthread_create(&c->helpers[i - 1], NULL, help, c) != 0) break;
		c->threads++;
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	c->clock = threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC;
	if (c->threads == threads) return c;
	hone_crew_free(c);
	return NULL;
}

void hone_crew_free(struct hone_crew *c) {
	if (!c) return;
	atomic_store(&c->quit, 1);
	union state s = {.word = atomic_load(&c->state)};
	s.serial++;
	atomic_store(&c->state, s.word);
	futex_wake(serial_of(c));
	for (int i = 1; i < c->threads; i++) pthread_join(c->helpers[i - 1], NULL);
	free(c);
}

bool hone_crew_run(struct hone_crew *c, struct ggml_tensor **nodes, int n, int64_t *times) {
	c->nodes = nodes, c->n = n, c->at = 0, c->times = times;
	open_node(c);
	work(c, false);
	return !c->stopped;
}

void hone_crew_stop(struct hone_crew *c, int stop) { atomic_store(&c->stop, stop); }
