package cli

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"github.com/hone-llm/hone/client"
)

// addServerFlags adds the flags of commands that talk to a running server.
func addServerFlags(cmd *cobra.Command) {
	cmd.Flags().String("base-url", "", "the server's address, ending in /v1 (default: $HONE_BASE_URL, else "+client.DefaultBaseURL+")")
}

// newClient returns a client of the server that the flags or the environment name.
func newClient(cmd *cobra.Command) (*client.Client, error) {
	base, err := cmd.Flags().GetString("base-url")
	if err != nil {
		return nil, err
	}
	if base == "" {
		base = os.Getenv("HONE_BASE_URL")
	}
	if base != "" && !strings.HasPrefix(base, "http://") && !strings.HasPrefix(base, "https://") {
		return nil, usageError{fmt.Errorf("base URL %q: expected http://HOST:PORT/v1", base)}
	}
	return client.New(base, os.Getenv("HONE_API_KEY")), nil
}

// readTemplate reads a question template; path "" is no template. The line end that editors put at the end is not part
// of it.
func readTemplate(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	template := strings.TrimRight(strings.ReplaceAll(string(data), "\r\n", "\n"), "\n")
	if err := client.CheckTemplate(template); err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	return template, nil
}

// meter shows how far work is: as a bar that redraws its line on a terminal, as a line now and then elsewhere.
type meter struct {
	out   io.Writer
	label string
	total int64
	start time.Time

	mu    sync.Mutex
	bars  *mpb.Progress // nil where out is no terminal
	bar   *mpb.Bar
	done  int64
	first int64 // done by an earlier run: not counted in the rate
	note  string
	shown time.Time // when the last line was printed
	full  bool      // the last line said 100%
	left  func() time.Duration
}

// plainInterval is the time between two lines where there is no terminal.
const plainInterval = 10 * time.Second

func newMeter(out io.Writer, label string, total, first int64) *meter {
	m := &meter{out: out, label: label, total: total, start: time.Now(), done: first, first: first, shown: time.Now()}
	if isTerminal(out) {
		m.bars = mpb.New(mpb.WithOutput(out), mpb.WithWidth(30))
		m.bar = m.bars.AddBar(total,
			mpb.PrependDecorators(decor.Name(label+" ")),
			mpb.AppendDecorators(decor.Any(func(decor.Statistics) string {
				m.mu.Lock()
				defer m.mu.Unlock()
				return m.status()
			})),
		)
		m.bar.SetCurrent(first)
	}
	return m
}

// set reports the work done so far, with a note to show beside it.
func (m *meter) set(done int64, note string) {
	m.mu.Lock()
	m.done, m.note = min(done, m.total), note
	bar := m.bar
	if bar == nil && (time.Since(m.shown) >= plainInterval || m.done == m.total && !m.full) {
		m.shown, m.full = time.Now(), m.done == m.total
		fmt.Fprintf(m.out, "%s: %s\n", m.label, m.status())
	}
	m.mu.Unlock()
	if bar != nil {
		// A bar that reaches its total is over; end decides that, since the last step may be followed by more work.
		bar.SetCurrent(min(done, m.total-1))
	}
}

// eta sets where the time left comes from; else it follows from the rate so far.
func (m *meter) eta(left func() time.Duration) { m.mu.Lock(); m.left = left; m.mu.Unlock() }

func (m *meter) status() string {
	text := fmt.Sprintf("%3d%%", 100*m.done/max(1, m.total))
	if m.note != "" {
		text += "  " + m.note
	}
	left := time.Duration(0)
	switch {
	case m.left != nil:
		left = m.left()
	case m.done > m.first:
		left = time.Duration(float64(time.Since(m.start)) / float64(m.done-m.first) * float64(m.total-m.done))
	}
	if left > 0 && m.done < m.total {
		text += "  ETA " + clock(left)
	}
	return text
}

// println prints a line, above the bar if there is one.
func (m *meter) println(line string) {
	if m.bars != nil {
		fmt.Fprintln(m.bars, line)
		return
	}
	fmt.Fprintln(m.out, line)
}

// end takes the bar off, or leaves it full if the work is complete.
func (m *meter) end(complete bool) {
	if m.bars == nil {
		return
	}
	if complete {
		m.mu.Lock()
		m.done = m.total
		m.mu.Unlock()
		m.bar.SetCurrent(m.total)
	} else {
		m.bar.Abort(false)
	}
	m.bars.Wait()
	m.bars, m.bar = nil, nil
}

// clock writes a duration as 0:07, 12:34 or 1:02:03.
func clock(d time.Duration) string {
	seconds := int(d.Round(time.Second).Seconds())
	if seconds >= 3600 {
		return fmt.Sprintf("%d:%02d:%02d", seconds/3600, seconds/60%60, seconds%60)
	}
	return fmt.Sprintf("%d:%02d", seconds/60, seconds%60)
}
