#include "bridge.h"
#include "_cgo_export.h"

static void forward_log(unsigned int level, const char * text, void * user_data) {
    (void) user_data;
    honeLlamaLog(level, (char *) text);
}

void hone_log_hook(void) {
    llama_log_set(forward_log, NULL);
}

bool hone_abort(void * data) {
    return __atomic_load_n((int *) data, __ATOMIC_RELAXED) != 0;
}

void hone_abort_set(int * flag, int value) {
    __atomic_store_n(flag, value, __ATOMIC_RELAXED);
}
