package graph

import (
	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/ggml"
)

// serverCache says which pages of the key-value cache hold which sequence. A page holds consecutive positions of one
// sequence; sequences with the same beginning share its pages, which are counted.
type serverCache struct {
	pages     int     // in all
	uses      []int32 // of each page, by sequences
	unused    []int32 // a stack: what was used last is used first
	sequences []heldSequence
	copyPage  func(from, to int32)
}

type heldSequence struct {
	tokens int
	pages  []int32 // its part of the tables that the attention reads
}

const pageTokens = ggml.PageTokens

func pagesOf(tokens int) int { return (tokens + pageTokens - 1) / pageTokens }

// describe chooses the number of pages: enough for the tokens however they lie, since each sequence may leave a page
// unfilled and need another to copy one that it shares.
func (c *serverCache) describe(tokens, sequences int) {
	c.pages = pagesOf(tokens) + 2*sequences
	c.sequences = make([]heldSequence, sequences)
}

func (c *serverCache) total() int { return c.pages }

// allocate makes the table [pages, sequences] that of the sequences.
func (c *serverCache) allocate(table []int32, copyPage func(from, to int32)) {
	c.copyPage = copyPage
	c.uses = make([]int32, c.pages)
	c.unused = make([]int32, c.pages)
	for i := range c.unused {
		c.unused[i] = int32(c.pages - 1 - i)
	}
	for i := range c.sequences {
		c.sequences[i].pages = table[i*c.pages : i*c.pages : (i+1)*c.pages]
	}
}

func (c *serverCache) has(s engine.Sequence) bool { return s >= 0 && int(s) < len(c.sequences) }

func (c *serverCache) length(s engine.Sequence) int { return c.sequences[s].tokens }

// free is how many tokens fit whichever sequences get them: each may need a new page for its first token and a copy of
// one that it shares.
func (c *serverCache) free() int {
	return max(0, len(c.unused)*pageTokens-len(c.sequences)*(2*pageTokens-2))
}

func (c *serverCache) share(from, to engine.Sequence, n int) bool {
	a, b := &c.sequences[from], &c.sequences[to]
	if from == to || b.tokens != 0 || n < 0 || n > a.tokens {
		return false
	}
	b.tokens, b.pages = n, append(b.pages[:0], a.pages[:pagesOf(n)]...)
	for _, page := range b.pages {
		c.uses[page]++
	}
	return true
}

func (c *serverCache) truncate(s engine.Sequence, n int) {
	q := &c.sequences[s]
	if n >= q.tokens {
		return
	}
	keep := pagesOf(n)
	for _, page := range q.pages[keep:] {
		c.drop(page)
	}
	q.tokens, q.pages = n, q.pages[:keep]
}

func (c *serverCache) drop(page int32) {
	if c.uses[page]--; c.uses[page] == 0 {
		c.unused = append(c.unused, page)
	}
}

func (c *serverCache) take() int32 {
	page := c.unused[len(c.unused)-1]
	c.unused = c.unused[:len(c.unused)-1]
	c.uses[page] = 1
	return page
}

// extend gives the parts' tokens cells. It returns engine.ErrNoRoom and changes nothing if there are too few.
func (c *serverCache) extend(parts []engine.Part) error {
	need := 0
	for _, p := range parts {
		q := &c.sequences[p.Sequence]
		need += pagesOf(q.tokens+len(p.Tokens)) - len(q.pages)
		if c.mustCopy(q) {
			need++
		}
	}
	if need > len(c.unused) {
		return engine.ErrNoRoom
	}
	for _, p := range parts {
		q := &c.sequences[p.Sequence]
		if c.mustCopy(q) {
			last := &q.pages[len(q.pages)-1]
			page := c.take()
			c.copyPage(*last, page)
			c.drop(*last)
			*last = page
		}
		q.tokens += len(p.Tokens)
		for len(q.pages) < pagesOf(q.tokens) {
			q.pages = append(q.pages, c.take())
		}
	}
	return nil
}

// mustCopy: the sequence's next token goes into a page that others hold, too.
func (c *serverCache) mustCopy(q *heldSequence) bool {
	return q.tokens%pageTokens != 0 && c.uses[q.pages[len(q.pages)-1]] > 1
}

// cell is where a position of a sequence lies.
func (c *serverCache) cell(s engine.Sequence, position int) int32 {
	return c.sequences[s].pages[position/pageTokens]*pageTokens + int32(position%pageTokens)
}
