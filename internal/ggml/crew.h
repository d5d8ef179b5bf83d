// A crew of threads that computes a list of custom nodes, one after the other.
//
// A node is cut into tasks, which the threads take as they come: a thread that shares its core with another busy process
// takes fewer, and nobody waits for one that sleeps without a task. Whoever ends the last task of a node opens the
// next one. A task's result does not depend on who computes it, so neither do the results on the number of threads.
#ifndef HONE_GGML_CREW_H
#define HONE_GGML_CREW_H

#include "kernels.h"

struct hone_crew;

// hone_crew_new starts threads-1 threads; the one that calls hone_crew_run is the last. NULL: they could not be started.
struct hone_crew *hone_crew_new(int threads);
void hone_crew_free(struct hone_crew *crew);

// hone_crew_run computes the nodes in order; false: hone_crew_stop ended it between two of them. With times, the
// nanoseconds that each node took are added there: of the processor if the crew is one thread, which other processes do not
// change, else of the clock.
bool hone_crew_run(struct hone_crew *crew, struct ggml_tensor **nodes, int n, int64_t *times);

// hone_crew_stop ends the run that is under way and every later one, until it is called with 0. Any thread may call it.
void hone_crew_stop(struct hone_crew *crew, int stop);

// The number of tasks of a custom node lies between ggml's own parameters and ours. FEW_TASKS: the first integer of the
// node's last source tensor is the number.
enum { HONE_TASKS = 6, HONE_TASKS_OF_SOURCE = 0 };

#endif
