package llama

import (
	"log/slog"
	"testing"
)

func TestSeverityOf(t *testing.T) {
	for _, c := range []struct {
		level slog.Level
		line  string
		want  slog.Level
	}{
		{slog.LevelError, "graph_compute: ggml_backend_sched_graph_compute_async failed with error 1", slog.LevelDebug},
		{slog.LevelError, "process_ubatch: failed to compute graph, compute status: 1", slog.LevelDebug},
		{slog.LevelError, "process_ubatch: failed to compute graph, compute status: -1", slog.LevelError},
		{slog.LevelError, "graph_compute: ggml_backend_sched_graph_compute_async failed with error -2", slog.LevelError},
		{slog.LevelWarn, "llama_context: n_ctx_seq (16384) > n_ctx_train (8192) -- possible training context overflow", slog.LevelDebug},
		{slog.LevelWarn, "llama_context: another warning", slog.LevelWarn},
	} {
		if got := severityOf(c.level, c.line); got != c.want {
			t.Errorf("%q at %v is logged at %v, want %v", c.line, c.level, got, c.want)
		}
	}
}
