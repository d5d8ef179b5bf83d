package child

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Limits of what is kept of a child.
const (
	maxLineBytes   = 16 << 20 // of one line of standard output
	lastErrorLines = 20       // of standard error, for ExitError
	maxErrorLine   = 2000     // bytes kept of each
)

// ErrLineTooLong ends the reading of a child's standard output.
var ErrLineTooLong = fmt.Errorf("line longer than %d bytes", maxLineBytes)

// Options says what to start.
type Options struct {
	Exe    string    // "": this binary
	Args   []string  // Args[0] is the role, runner or trainer
	Env    []string  // added to this process's environment
	Dir    string    // "": this process's
	Config any       // written as JSON, the first line of standard input
	Stderr io.Writer // gets the child's standard error; nil drops it, the last lines are kept for ExitError anyway
	Nice   int       // added to the child's niceness, 0 to 19
}

// Process is a running child. Its methods may be called from several goroutines, but only one may call Next.
//
// The kernel kills the child when this process ends, however it ends; a child also sees its standard input end.
type Process struct {
	name  string
	cmd   *exec.Cmd
	lines *bufio.Reader
	out   *os.File

	writing sync.Mutex // of in
	in      io.WriteCloser
	mu      sync.Mutex // of why
	why     string     // this process killed it
	ended   chan struct{}
	err     error // set before ended is closed
}

// ExitError says how a child ended, when it ended otherwise than with code 0.
type ExitError struct {
	Name   string         // runner, trainer
	Code   int            // exit code, -1 if a signal ended it
	Signal syscall.Signal // 0 if none
	Stderr []string       // last lines of standard error
	Why    string         // this process ended it, such as "gave no sign of life for 2m and was killed"; "" if it did not
}

func (e *ExitError) Error() string {
	how := fmt.Sprintf("exited with code %d", e.Code)
	if e.Signal != 0 {
		how = fmt.Sprintf("was ended by signal %d (%s)", int(e.Signal), e.Signal)
	}
	if e.Why != "" {
		how = e.Why
	}
	if len(e.Stderr) == 0 {
		return fmt.Sprintf("the %s %s", e.Name, how)
	}
	return fmt.Sprintf("the %s %s; it last said: %s", e.Name, how, e.Stderr[len(e.Stderr)-1])
}

// Start starts a child and sends it its configuration. When ctx ends, the child is killed.
// The caller must see the child's end: by Wait, Stop or Kill.
func Start(ctx context.Context, opts Options) (*Process, error) {
	name := "child"
	if len(opts.Args) > 0 {
		name = opts.Args[0]
	}
	config, err := json.Marshal(opts.Config)
	if err != nil {
		return nil, fmt.Errorf("encode the configuration of the %s: %w", name, err)
	}
	exe := opts.Exe
	if exe == "" {
		if exe, err = os.Executable(); err != nil {
			return nil, fmt.Errorf("find the program to start the %s: %w", name, err)
		}
	}
	cmd := exec.CommandContext(ctx, exe, opts.Args...)
	cmd.Dir = opts.Dir
	// A child that a hostile file has taken over is not to find the API's key, nor that of the hub.
	cmd.Env = append(slices.DeleteFunc(os.Environ(), isSecret), opts.Env...)
	// Its own process group: a terminal's Ctrl-C reaches serve alone, which then stops its children in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	cmd.Cancel = func() error { return killGroup(cmd.Process.Pid) }
	cmd.WaitDelay = 2 * time.Second // for a grandchild that keeps standard error open
	last := &lastLines{next: opts.Stderr}
	cmd.Stderr = last
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start the %s: %w", name, err)
	}
	out, outWriter, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start the %s: %w", name, err)
	}
	cmd.Stdout = outWriter
	err = fork(cmd, opts.Nice)
	outWriter.Close()
	if err != nil {
		out.Close()
		in.Close()
		return nil, fmt.Errorf("start the %s: %w", name, err)
	}
	p := &Process{name: name, cmd: cmd, lines: bufio.NewReaderSize(out, 64<<10), out: out, in: in, ended: make(chan struct{})}
	go p.reap(last)
	if err := p.write(append(config, '\n')); err != nil {
		// It ended before it read its configuration: how it ended says more than a broken pipe does.
		if exit := p.Kill(); exit != nil {
			err = exit
		}
		p.Close()
		return nil, fmt.Errorf("start the %s: %w", name, err)
	}
	return p, nil
}

// forkers are the threads that start children, one for each niceness, for the life of the process.
//
// Pdeathsig is sent when the thread that forked ends, not the process. Go ends threads when it likes, so every fork
// happens on a thread that a goroutine locks and never leaves. A thread that has raised its own niceness passes
// it on to all threads of the child, which setting it later from outside would not.
var forkers = struct {
	sync.Mutex
	byNice map[int]chan func()
}{byNice: map[int]chan func(){}}

func fork(cmd *exec.Cmd, nice int) error {
	nice = min(max(nice, 0), 19)
	forkers.Lock()
	work, ok := forkers.byNice[nice]
	if !ok {
		work = make(chan func())
		forkers.byNice[nice] = work
		go forkThread(work, nice)
	}
	forkers.Unlock()
	result := make(chan error, 1)
	work <- func() { result <- cmd.Start() }
	return <-result
}

func forkThread(work <-chan func(), nice int) {
	runtime.LockOSThread()
	if nice > 0 {
		// A system that forbids it runs the child at the ordinary priority, which is slower for others and not wrong.
		_ = syscall.Setpriority(syscall.PRIO_PROCESS, syscall.Gettid(), nice)
	}
	for f := range work {
		f()
	}
}

// reap waits for the process and its standard error.
func (p *Process) reap(last *lastLines) {
	err := p.cmd.Wait()
	_ = killGroup(p.cmd.Process.Pid) // what the child may have started
	state := p.cmd.ProcessState
	switch status, ok := state.Sys().(syscall.WaitStatus); {
	case ok && status.Signaled():
		p.mu.Lock()
		why := p.why
		p.mu.Unlock()
		p.err = &ExitError{Name: p.name, Code: -1, Signal: status.Signal(), Stderr: last.lines(), Why: why}
	case state.ExitCode() != 0:
		p.err = &ExitError{Name: p.name, Code: state.ExitCode(), Stderr: last.lines()}
	case err != nil && !errors.Is(err, exec.ErrWaitDelay):
		p.err = fmt.Errorf("wait for the %s: %w", p.name, err)
	}
	close(p.ended)
}

func killGroup(pid int) error {
	err := syscall.Kill(-pid, syscall.SIGKILL)
	if errors.Is(err, syscall.ESRCH) {
		return os.ErrProcessDone
	}
	return err
}

// PID returns the child's process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Next returns the next line of the child's standard output without its newline; the slice is the caller's. It
// returns io.EOF after the last line, when the child has ended or closed its output, and then Wait says how.
func (p *Process) Next() ([]byte, error) {
	line, err := readLine(p.lines)
	if errors.Is(err, os.ErrClosed) {
		err = io.EOF
	}
	return line, err
}

// readLine reads a line of at most maxLineBytes. The last may lack its newline.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		line = append(line, part...)
		switch {
		case len(line) > maxLineBytes:
			return nil, ErrLineTooLong
		case err == nil || errors.Is(err, io.EOF) && len(line) > 0:
			return bytes.TrimRight(line, "\r\n"), nil
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
	}
}

// Send writes v as one line of JSON to the child's standard input.
func (p *Process) Send(v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode a line for the %s: %w", p.name, err)
	}
	if err := p.write(append(line, '\n')); err != nil {
		return fmt.Errorf("write to the %s: %w", p.name, err)
	}
	return nil
}

func (p *Process) write(line []byte) error {
	p.writing.Lock()
	defer p.writing.Unlock()
	_, err := p.in.Write(line)
	return err
}

// Done is closed when the child has ended.
func (p *Process) Done() <-chan struct{} { return p.ended }

// Wait waits until the child has ended. It returns nil for exit code 0, else mostly an *ExitError.
func (p *Process) Wait() error {
	<-p.ended
	return p.err
}

// Stop ends the child softly, by SIGTERM and the end of its standard input, and kills it when ctx ends before it has.
// It returns what Wait returns, and may be called more than once.
func (p *Process) Stop(ctx context.Context) error {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // already gone is what was wanted
	p.closeInput()
	select {
	case <-p.ended:
	case <-ctx.Done():
		return p.Kill()
	}
	return p.Wait()
}

// closeInput does not wait for a write that the child does not read: closing a pipe ends it.
func (p *Process) closeInput() { _ = p.in.Close() }

// Kill ends the child at once, with all it may have started, and returns what Wait returns.
func (p *Process) Kill() error {
	select {
	case <-p.ended:
	default:
		_ = killGroup(p.cmd.Process.Pid)
	}
	return p.Wait()
}

// killBecause is Kill, and says in the *ExitError why: "gave no sign of life and was killed".
func (p *Process) killBecause(why string) {
	p.mu.Lock()
	p.why = why
	p.mu.Unlock()
	_ = p.Kill() // Wait says how it ended
}

// Close kills the child if it still runs and frees the pipes; lines not yet read are lost.
func (p *Process) Close() {
	_ = p.Kill()
	p.closeInput()
	_ = p.out.Close()
}

// lastLines passes standard error on and keeps its last lines.
type lastLines struct {
	next io.Writer

	mu   sync.Mutex
	done []string
	part []byte
	dead bool // the rest is a trace of the end
}

// lastWords begin a trace of a process that Go's runtime ends; what ggml says of a failed assertion comes before that.
var lastWords = []string{"SIGABRT: ", "SIGSEGV: ", "SIGBUS: ", "SIGFPE: ", "SIGILL: ", "SIGQUIT: ", "fatal error: ", "panic: "}

func (l *lastLines) Write(data []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.next != nil {
		_, _ = l.next.Write(data) // a log that cannot be written must not end the child
	}
	for rest := data; len(rest) > 0; {
		line, after, whole := bytes.Cut(rest, []byte("\n"))
		if room := maxErrorLine - len(l.part); room > 0 {
			l.part = append(l.part, line[:min(room, len(line))]...)
		}
		if whole {
			l.keep()
		}
		rest = after
	}
	return len(data), nil
}

func (l *lastLines) keep() {
	if text := strings.TrimSpace(string(l.part)); text != "" && !l.dead {
		l.dead = strings.Contains(text, "GGML_ASSERT(") || slices.ContainsFunc(lastWords, func(words string) bool { return strings.HasPrefix(text, words) })
		l.done = append(l.done, text)
		if len(l.done) > lastErrorLines {
			l.done = slices.Delete(l.done, 0, 1)
		}
	}
	l.part = l.part[:0]
}

func (l *lastLines) lines() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.keep()
	return slices.Clone(l.done)
}

// maxSocketParent leaves room for the rest of a socket's path, whose 108 bytes the kernel sets.
const maxSocketParent = 60

// socketDir makes a directory that only this user may enter, below parent or, if parent is empty or too long for a
// socket's path, below a temporary one.
func socketDir(parent string) (string, error) {
	for _, parent := range []string{parent, os.Getenv("XDG_RUNTIME_DIR"), os.TempDir(), "/tmp"} {
		if len(parent) > maxSocketParent || !filepath.IsAbs(parent) {
			continue
		}
		if dir, err := os.MkdirTemp(parent, "hone-"); err == nil { // mode 0700
			return dir, nil
		}
	}
	return "", fmt.Errorf("no directory for a socket: nothing can be written below XDG_RUNTIME_DIR, TMPDIR and /tmp with a path of at most %d bytes", maxSocketParent)
}

// isSecret reports whether a variable of the environment is a key that children have no use for.
func isSecret(variable string) bool {
	name, _, _ := strings.Cut(variable, "=")
	return slices.Contains([]string{"HONE_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}, name)
}
