package runner

import (
	"cmp"
	"slices"

	"github.com/hone-llm/hone/internal/engine"
)

// slot is one of the decoder's sequence numbers and what the cache holds for it.
type slot struct {
	number engine.Sequence
	owner  *sequence // nil: kept for its prefix
	node   *node     // where its tokens end in the prefix cache; nil: it holds none there
}

// held is how many tokens of the slot the prefix cache knows.
func (s *slot) held() int {
	if s.node == nil {
		return 0
	}
	return s.node.depth
}

// radix is the prefix cache's index: one radix tree over token ids for each adapter (nil: the base model). A slot ends
// where its tokens end in the tree; every slot in the subtree below a node holds the tokens up to that node. Running
// sequences are part of it and grow in it, so that others can share what they have computed.
//
// A node without slots has at least two children, so the tokens that one slot alone holds are those of one leaf.
type radix struct {
	roots map[*adapter]*node
}

type node struct {
	parent   *node // nil of a root
	children []*node
	tokens   []engine.Token // between the parent's end and this node's; not empty but of a root
	depth    int            // tokens from the root to this node's end
	scores   []score        // of its first tokens, as far as they are known
	slots    []*slot        // end here
	used     int64          // step in which the tokens were used last
}

func newRadix() *radix { return &radix{roots: map[*adapter]*node{}} }

// match returns how many of the tokens the tree holds, and the node in or at the end of which they end; nil if none.
func (r *radix) match(a *adapter, tokens []engine.Token) (n int, at *node) {
	at = r.roots[a]
	for at != nil && n < len(tokens) {
		next := at.child(tokens[n])
		if next == nil {
			break
		}
		common := commonPrefix(next.tokens, tokens[n:])
		n, at = n+common, next
		if common < len(next.tokens) {
			break
		}
	}
	if n == 0 {
		return 0, nil
	}
	return n, at
}

// matchWhole returns the idle slot all of whose tokens are the beginning of these, the one with the most; nil if there
// is none.
func (r *radix) matchWhole(a *adapter, tokens []engine.Token) *slot {
	var best *slot
	at, n := r.roots[a], 0
	for at != nil && n < len(tokens) {
		at = at.child(tokens[n])
		if at == nil || commonPrefix(at.tokens, tokens[n:]) < len(at.tokens) {
			break
		}
		n = at.depth
		if idle := at.idle(); idle != nil {
			best = idle
		}
	}
	return best
}

// add makes a slot that the tree does not know hold these tokens, at least one.
func (r *radix) add(s *slot, a *adapter, tokens []engine.Token, step int64) {
	root := r.roots[a]
	if root == nil {
		root = &node{}
		r.roots[a] = root
	}
	s.node = root
	root.slots = append(root.slots, s)
	r.extend(s, tokens, step)
}

// extend makes a slot of the tree hold these tokens more.
func (r *radix) extend(s *slot, tokens []engine.Token, step int64) {
	at := s.node
	if len(tokens) == 0 {
		return
	}
	if at.parent != nil && len(at.slots) == 1 && len(at.children) == 0 {
		// It ends in a leaf of its own, as every running sequence soon does.
		at.tokens = append(at.tokens, tokens...)
		at.depth += len(tokens)
		at.touch(step)
		return
	}
	at.leave(s)
	from := at
	for len(tokens) > 0 {
		next := at.child(tokens[0])
		if next == nil {
			next = &node{parent: at, tokens: slices.Clone(tokens), depth: at.depth + len(tokens)}
			at.children = append(at.children, next)
		}
		common := commonPrefix(next.tokens, tokens)
		if common < len(next.tokens) {
			next = next.split(common)
		}
		at, tokens = next, tokens[common:]
	}
	at.slots = append(at.slots, s)
	s.node = at
	at.touch(step)
	r.tidy(from)
}

// cut makes a slot of the tree hold its first n tokens only; 0 takes it out.
func (r *radix) cut(s *slot, n int) {
	at := s.node
	if at == nil || n >= at.depth {
		return
	}
	at.leave(s)
	s.node = nil
	left := at
	if n > 0 {
		for at.parent != nil && at.parent.depth >= n {
			at = at.parent
		}
		if n < at.depth {
			at = at.split(n - at.parent.depth)
		}
		at.slots = append(at.slots, s)
		s.node = at
	}
	r.tidy(left)
}

// forget takes every slot of an adapter out of the tree and returns them.
func (r *radix) forget(a *adapter) []*slot {
	root := r.roots[a]
	if root == nil {
		return nil
	}
	delete(r.roots, a)
	slots := root.below(nil)
	for _, s := range slots {
		s.node = nil
	}
	return slots
}

// tidy keeps the tree's rules from a node upwards that has lost a slot or a child.
func (r *radix) tidy(n *node) {
	for n.parent != nil && len(n.slots) == 0 && len(n.children) == 0 {
		parent := n.parent
		parent.children = slices.DeleteFunc(parent.children, func(c *node) bool { return c == n })
		n = parent
	}
	if n.parent == nil {
		if len(n.slots) == 0 && len(n.children) == 0 {
			for a, root := range r.roots {
				if root == n {
					delete(r.roots, a)
				}
			}
		}
		return
	}
	if len(n.slots) == 0 && len(n.children) == 1 {
		// Merge with the only child, which keeps its place among its slots' nodes.
		child := n.children[0]
		if len(n.scores) == len(n.tokens) {
			child.scores = slices.Concat(n.scores, child.scores)
		} else {
			child.scores = n.scores
		}
		child.tokens = slices.Concat(n.tokens, child.tokens)
		child.parent, child.used = n.parent, max(n.used, child.used)
		for i, c := range n.parent.children {
			if c == n {
				n.parent.children[i] = child
			}
		}
	}
}

// victim returns the idle slot to be given up first: one whose tokens others hold too, else the one whose own tokens
// were not used for longest; nil if none is idle. Where whole is set, only whole sequences can be shared, and what others
// hold too may still be needed.
func victim(slots []*slot, whole bool) *slot {
	var best *slot
	rank := func(s *slot) int64 {
		if !whole && (len(s.node.children) > 0 || len(s.node.slots) > 1) {
			return -1
		}
		return s.node.used
	}
	for _, s := range slots {
		if s.owner == nil && s.node != nil && (best == nil || cmp.Less(rank(s), rank(best))) {
			best = s
		}
	}
	return best
}

func (n *node) child(first engine.Token) *node {
	for _, c := range n.children {
		if c.tokens[0] == first {
			return c
		}
	}
	return nil
}

// split puts a new node into the middle of n's tokens, after the first of them, and returns it.
func (n *node) split(first int) *node {
	upper := &node{parent: n.parent, children: []*node{n}, tokens: slices.Clone(n.tokens[:first]), depth: n.depth - len(n.tokens) + first, used: n.used}
	for i, c := range n.parent.children {
		if c == n {
			n.parent.children[i] = upper
		}
	}
	n.parent, n.tokens = upper, slices.Clone(n.tokens[first:])
	upper.scores, n.scores = splitScores(n.scores, first)
	return upper
}

func (n *node) leave(s *slot) {
	n.slots = slices.DeleteFunc(n.slots, func(o *slot) bool { return o == s })
}

// touch notes that the tokens up to the node's end were used.
func (n *node) touch(step int64) {
	for ; n != nil; n = n.parent {
		n.used = step
	}
}

// idle returns a slot that ends here and has no owner, nil if there is none.
func (n *node) idle() *slot {
	for _, s := range n.slots {
		if s.owner == nil {
			return s
		}
	}
	return nil
}

// holder returns a slot that holds the tokens up to the node's end: one that ends here if there is one.
func (n *node) holder() *slot {
	for len(n.slots) == 0 {
		n = n.children[0]
	}
	return n.slots[0]
}

// below appends all slots of the subtree.
func (n *node) below(to []*slot) []*slot {
	to = append(to, n.slots...)
	for _, c := range n.children {
		to = c.below(to)
	}
	return to
}

func commonPrefix(a, b []engine.Token) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}
