package dataset

import (
	"cmp"
	"slices"

	"github.com/hone-llm/hone/internal/engine"
	"github.com/hone-llm/hone/internal/prompt"
)

// minShared is the fewest tokens that are worth a segment of their own for rows that share them: a segment more costs
// its rows' attention another block, about what computing a handful of tokens again does.
const minShared = 8

// Micro is some examples packed for one pass through the model: every candidate is a path from a root of Batch's
// segments to its last trained token, which is a label only. The tokens after that are not there: nothing follows from
// them. Batch.Seeds is left to the caller, which has the seed; Owners says of what to make it.
type Micro struct {
	Batch engine.Batch // each target's weight is the sum of the weights of the candidates that have it
	// Owners [T] are, for each token of Batch, the first candidate that it belongs to and its position there.
	Owners     []Owner
	Candidates []Candidate // of all examples, in order
	Tokens     int         // of the examples, as Example.Tokens: what was asked for, not what is computed
}

// Owner is a token of a row.
type Owner struct{ Row, Candidate, Position int32 }

// Candidate says where a candidate's trained tokens are in a micro-batch. Its log-probability is minus the sum over i of
// Weights[i] times the loss of Batch.Targets[Targets[i]].
type Candidate struct {
	Example int // index into what Pack was given
	Index   int // into the example's candidates
	Targets []int32
	Weights []float32 // the candidate's own
}

// Pack makes micro-batches of examples, in order. Each has at most maxTokens tokens, or one example that has more: the
// candidates of an example stay together. They share the tokens that they begin with; with share, so do all examples
// of a micro-batch.
func Pack(examples []Example, maxTokens int, share bool) []Micro {
	var micros []Micro
	start := 0
	t := newTree(examples, share)
	for i := range examples {
		t.add(i)
		if t.tokens > maxTokens && i > start {
			t = newTree(examples, share)
			for j := start; j < i; j++ {
				t.add(j)
			}
			micros = append(micros, t.micro())
			start = i
			t = newTree(examples, share)
			t.add(i)
		}
	}
	if len(examples) > start {
		micros = append(micros, t.micro())
	}
	return micros
}

// Shared estimates the share of an epoch's tokens, in [0, 1), that need not be computed when examples share what they
// begin with: it packs batches, taken evenly from the order, with and without.
func (d *Dataset) Shared(o Order, batchSize, maxTokens int) (float64, error) {
	const sample = 2000 // examples
	batches := (o.Len() + batchSize - 1) / batchSize
	step := max(1, batches*batchSize/sample)
	alone, together := 0, 0
	for i := 0; i < batches; i += step {
		examples, err := d.Examples(o, i*batchSize, (i+1)*batchSize)
		if err != nil {
			return 0, err
		}
		for _, m := range Pack(examples, maxTokens, false) {
			alone += len(m.Batch.Tokens)
		}
		for _, m := range Pack(examples, maxTokens, true) {
			together += len(m.Batch.Tokens)
		}
	}
	if alone == 0 {
		return 0, nil
	}
	return 1 - float64(together)/float64(alone), nil
}

// tree is a radix tree over token ids.
type tree struct {
	examples []Example
	share    bool
	roots    []*node // without tokens; one for all examples, or one for each
	tokens   int
	paths    []path
}

// node is a run of tokens that all paths through it have.
type node struct {
	parent   *node
	children []*node
	depth    int // of its first token in its rows
	tokens   []engine.Token
	owner    Owner // of its first token
	begin    int   // of its tokens in the micro-batch; set by micro
	segment  int
}

// path is where a candidate ends in the tree.
type path struct {
	example, candidate int
	length             int   // tokens from the root
	end                *node // the last of them is in it
}

func newTree(examples []Example, share bool) *tree {
	return &tree{examples: examples, share: share}
}

// add inserts the candidates of an example.
func (t *tree) add(example int) {
	if !t.share || len(t.roots) == 0 {
		t.roots = append(t.roots, &node{})
	}
	root := t.roots[len(t.roots)-1]
	e := t.examples[example]
	for i, c := range e.Candidates {
		length := lastTarget(c)
		p := path{example: example, candidate: i, length: length}
		if length > 0 {
			p.end = t.insert(root, c.Tokens[:length], Owner{Row: int32(e.Row), Candidate: int32(i)})
		}
		t.paths = append(t.paths, p)
	}
}

// lastTarget is the position of the last trained token, 0 if there is none: the first is never trained.
func lastTarget(r prompt.Row) int {
	last := len(r.Tokens) - 1
	for last > 0 && r.Weights[last] == 0 {
		last--
	}
	return max(last, 0)
}

// insert adds a path of tokens and returns the node that its last token is in.
func (t *tree) insert(at *node, tokens []engine.Token, owner Owner) *node {
	depth := 0
	for {
		var next *node
		same := 0
		for _, child := range at.children {
			if n := common(child.tokens, tokens[depth:]); n > same {
				next, same = child, n
			}
		}
		switch {
		case next != nil && depth+same == len(tokens): // nothing is added, so nothing is split
			return next
		case next == nil, same < minShared && (same < len(next.tokens) || len(next.children) == 0):
			// Nothing is shared, or too little for a segment.
			leaf := &node{parent: at, depth: depth, tokens: tokens[depth:], owner: owner}
			leaf.owner.Position = int32(depth)
			at.children = append(at.children, leaf)
			t.tokens += len(leaf.tokens)
			return leaf
		case same < len(next.tokens):
			next.split(same)
			next = next.parent
		}
		at, depth = next, depth+same
	}
}

// split gives the first n tokens to a new node above. Paths that end in n keep ending there: they are as long as they
// are.
func (n *node) split(at int) {
	upper := &node{parent: n.parent, children: []*node{n}, depth: n.depth, tokens: n.tokens[:at], owner: n.owner}
	siblings := n.parent.children
	siblings[slices.Index(siblings, n)] = upper
	n.parent, n.tokens, n.depth = upper, n.tokens[at:], n.depth+at
	n.owner.Position += int32(at)
}

// micro lays the tree out.
func (t *tree) micro() Micro {
	m := Micro{Batch: engine.Batch{Tokens: make([]engine.Token, 0, t.tokens)}, Owners: make([]Owner, 0, t.tokens)}
	for _, root := range t.roots {
		for _, child := range root.children {
			m.lay(child, -1)
		}
	}
	var claims []claim
	last := -1
	for i, p := range t.paths {
		e := t.examples[p.example]
		if p.example != last {
			m.Tokens += e.Tokens
			last = p.example
		}
		c := Candidate{Example: p.example, Index: p.candidate}
		row := e.Candidates[p.candidate]
		claims = p.claims(claims, i, row)
		for _, w := range row.Weights[min(1, len(row.Weights)):] {
			if w != 0 {
				c.Weights = append(c.Weights, w)
			}
		}
		c.Targets = make([]int32, len(c.Weights))
		m.Candidates = append(m.Candidates, c)
	}
	slices.SortStableFunc(claims, func(a, b claim) int {
		return cmp.Or(cmp.Compare(a.target.Position, b.target.Position), cmp.Compare(a.target.Label, b.target.Label))
	})
	for _, c := range claims {
		n := len(m.Batch.Targets)
		if n > 0 && m.Batch.Targets[n-1].Position == c.target.Position && m.Batch.Targets[n-1].Label == c.target.Label {
			m.Batch.Targets[n-1].Weight += c.target.Weight
			n--
		} else {
			m.Batch.Targets = append(m.Batch.Targets, c.target)
		}
		m.Candidates[c.candidate].Targets[c.index] = int32(n)
	}
	return m
}

// lay appends a node and those below it.
func (m *Micro) lay(n *node, parent int) {
	n.begin, n.segment = len(m.Batch.Tokens), len(m.Batch.Segments)
	m.Batch.Tokens = append(m.Batch.Tokens, n.tokens...)
	m.Batch.Segments = append(m.Batch.Segments, engine.Segment{Start: n.begin, End: len(m.Batch.Tokens), Parent: parent})
	for i := range n.tokens {
		owner := n.owner
		owner.Position += int32(i)
		m.Owners = append(m.Owners, owner)
	}
	for _, child := range n.children {
		m.lay(child, n.segment)
	}
}

// claim is a trained token of a candidate.
type claim struct {
	target           engine.Target
	candidate, index int // into Micro.Candidates, and into its Targets
}

// claims appends those of a path's candidate.
func (p path) claims(to []claim, candidate int, row prompt.Row) []claim {
	first := len(to)
	for i := 1; i <= p.length; i++ {
		if w := row.Weights[i]; w != 0 {
			to = append(to, claim{engine.Target{Position: i - 1, Label: row.Tokens[i], Weight: w}, candidate, len(to) - first})
		}
	}
	// From positions in the row to positions in the micro-batch, from the end up.
	i := len(to) - 1
	for n := p.end; n != nil && n.parent != nil; n = n.parent {
		for ; i >= first && to[i].target.Position >= n.depth; i-- {
			to[i].target.Position += n.begin - n.depth
		}
	}
	return to
}
