// Command load puts hone under load and says whether it keeps what it promises.
//
//	go run ./scripts/load -hone bin/hone -model MODEL.gguf          500 clients at once beside 2,000 requests/s
//	go run ./scripts/load -hone bin/hone -soak 20m                  jobs, chats, uploads, batches and deletes at random
//
// It starts the server itself, over a throw-away data directory, and ends with code 1 if a promise is broken.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	log.SetFlags(0)
	binary := flag.String("hone", "bin/hone", "the server's binary")
	model := flag.String("model", os.Getenv("HONE_TEST_MODEL"), "the model that answers under load, a GGUF file")
	tiny := flag.String("tiny", "internal/train/testdata/tiny-llama-q4_1.gguf", "the model that is trained and asked in a soak")
	var l load
	flag.IntVar(&l.clients, "clients", 500, "clients that ask at once")
	flag.IntVar(&l.sequences, "sequences", 64, "answers that the server computes at once (HONE_SEQUENCES)")
	flag.IntVar(&l.tokens, "tokens", 96, "tokens of a streamed answer")
	flag.IntVar(&l.rate, "rate", 2000, "requests a second for /health and /v1/models")
	flag.DurationVar(&l.duration, "duration", time.Minute, "how long the clients go on asking")
	var s soak
	flag.DurationVar(&s.duration, "soak", 0, "soak for so long instead")
	flag.StringVar(&s.samples, "samples", "build/soak.csv", "the file for the soak's samples")
	flag.Uint64Var(&s.seed, "seed", uint64(time.Now().UnixNano()), "of what the soak does at random")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	if s.duration > 0 {
		err = withServer(*binary, *tiny, "tiny", []string{"HONE_RETENTION_EVENTS=1s", "HONE_RETENTION_CHECKPOINTS=1s"}, func(srv *server) error { return s.run(ctx, srv) })
	} else {
		err = withServer(*binary, *model, "default", []string{fmt.Sprint("HONE_SEQUENCES=", l.sequences)}, func(srv *server) error { return l.run(ctx, srv) })
	}
	if err != nil {
		stop()
		log.Fatal(err)
	}
}

// server is a running hone serve with one model.
type server struct {
	url, model, home string
	pid              int
}

// withServer runs do beside a server whose only model is a file.
func withServer(binary, file, model string, env []string, do func(*server) error) (err error) {
	home, err := os.MkdirTemp("", "hone-load-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(home)) }()
	env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "HONE_") }),
		append(env, "HONE_HOME="+home, "HONE_DEFAULT_MODEL="+model, "HONE_LOG_LEVEL=warn")...)
	add := exec.Command(binary, "models", "add", file, "--name", model)
	add.Env = env
	if out, err := add.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", add, err, out)
	}
	serve := exec.Command(binary, "serve", "--host", "127.0.0.1", "--port", "0")
	serve.Env, serve.Stderr = env, os.Stderr
	serve.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	out, err := serve.StdoutPipe()
	if err != nil {
		return err
	}
	if err := serve.Start(); err != nil {
		return err
	}
	s := &server{model: model, home: home, pid: serve.Process.Pid}
	lines := bufio.NewScanner(out)
	for s.url == "" && lines.Scan() {
		if line := lines.Text(); strings.HasPrefix(line, "listening") {
			s.url = line[strings.LastIndexByte(line, ' ')+1:]
		}
	}
	go func() { // what it writes later is of no interest, and must not hold it up
		for lines.Scan() {
		}
	}()
	if s.url != "" {
		err = do(s)
	}
	_ = serve.Process.Signal(syscall.SIGTERM) // it may have ended
	if ended := serve.Wait(); ended != nil {
		err = errors.Join(err, fmt.Errorf("hone serve: %w", ended))
	}
	return err
}

// percentiles writes the 50th, 95th and 99th percentile, and the most.
func percentiles(took []time.Duration) string {
	if len(took) == 0 {
		return "none"
	}
	slices.Sort(took)
	at := func(p float64) time.Duration { return round(took[int(p*float64(len(took)-1))]) }
	return fmt.Sprintf("p50 %v, p95 %v, p99 %v, most %v", at(.5), at(.95), at(.99), at(1))
}

func round(d time.Duration) time.Duration {
	switch {
	case d > time.Second:
		return d.Round(10 * time.Millisecond)
	case d > 10*time.Millisecond:
		return d.Round(time.Millisecond)
	}
	return d.Round(10 * time.Microsecond)
}

// directoryBytes is what the files below dir take on the disk.
func directoryBytes(dir string) (total int64) {
	_ = filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil {
			return nil //nolint:nilerr // it went while it was looked at
		}
		var stat syscall.Stat_t
		if syscall.Lstat(path, &stat) == nil && !entry.IsDir() {
			total += stat.Blocks * 512
		}
		return nil
	})
	return total
}
