// C helpers of this package: hooks that C calls, which cannot be written in a Go file that exports functions.
#ifndef HONE_LLAMA_BRIDGE_H
#define HONE_LLAMA_BRIDGE_H

#include <stdlib.h>
#include "api.h"

// hone_log_hook sends the library's log to the Go function honeLlamaLog.
void hone_log_hook(void);

// hone_abort is an abort callback: true once the int that data points to is not 0. It is called between the nodes of
// a running graph, so it reads a flag in C memory and does not enter Go.
bool hone_abort(void * data);
void hone_abort_set(int * flag, int value);

#endif
