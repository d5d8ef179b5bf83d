package graph

import (
	"cmp"
	"slices"

	"github.com/hone-llm/hone/internal/engine"
)

// grouping splits the attention over a forest of segments into dense blocks of one size that a device multiplies as a
// batch. A group computes the queries of some segments; its keys are their tokens and those of their ancestors, so that
// a shared prefix appears in several groups. Queries and keys are padded to the longest group.
//
// A padded query attends to padded keys alone, and nothing else attends to those, so that padding, which holds copies
// of token 0, neither reaches a result nor a gradient.
type grouping struct {
	groups, queries, keys int     // groups, and padded tokens of each
	query                 []int   // [groups*queries] token of each query, -1 is padding
	key                   []int   // [groups*keys]
	querySlot, keySlot    []int   // [T] index of each token in query and in key (that of its own segment's group)
	copies                [][]int // for each token of several keys, all its indices in key
	copied                []int   // those tokens
	allowed               []bool  // [groups][queries][keys]
}

// maxBatch is how many matrices CUDA multiplies at once; ggml runs larger batches elsewhere.
const maxBatch = 1024

// group finds the grouping that computes least, of at most limit groups.
func group(segments []engine.Segment, limit int) grouping {
	ancestors := make([][]int, len(segments)) // of a segment, with itself
	longest, total := 0, 0
	for i, s := range segments {
		if s.Parent >= 0 {
			ancestors[i] = slices.Clone(ancestors[s.Parent])
		}
		ancestors[i] = append(ancestors[i], i)
		n := 0
		for _, a := range ancestors[i] {
			n += segments[a].End - segments[a].Start
		}
		longest = max(longest, n)
		total += s.End - s.Start
	}
	var best []set
	bestCost := 0
	for capacity := longest; ; capacity = capacity*5/4 + 1 {
		sets := pack(segments, ancestors, capacity)
		queries, keys := extent(sets)
		// The products cost queries x keys each, and gathering a few dozen times the tokens.
		cost := len(sets) * (queries*keys + 32*(queries+keys))
		if len(sets) <= limit && (best == nil || cost < bestCost) {
			best, bestCost = sets, cost
		}
		if len(sets) == 1 || best != nil && capacity > 4*longest {
			break
		}
	}
	return layOut(segments, ancestors, best, total)
}

// set is a group's segments: those whose queries it computes, and in keys also their ancestors, in order.
type set struct {
	own, keys      []int
	queries, count int // tokens
}

// pack fills groups of at most capacity keys with segments, the longest first.
func pack(segments []engine.Segment, ancestors [][]int, capacity int) []set {
	order := make([]int, len(segments))
	for i := range order {
		order[i] = i
	}
	length := func(i int) int { return segments[i].End - segments[i].Start }
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(length(b), length(a)) })
	var sets []set
	for _, i := range order {
		at := -1
		for j, s := range sets {
			if s.count+missing(s, ancestors[i], length) <= capacity {
				at = j
				break
			}
		}
		if at < 0 {
			at = len(sets)
			sets = append(sets, set{})
		}
		s := &sets[at]
		s.count += missing(*s, ancestors[i], length)
		s.own = append(s.own, i)
		s.queries += length(i)
		s.keys = append(s.keys, ancestors[i]...)
		slices.Sort(s.keys)
		s.keys = slices.Compact(s.keys)
	}
	return sets
}

func missing(s set, wanted []int, length func(int) int) int {
	n := 0
	for _, a := range wanted {
		if _, ok := slices.BinarySearch(s.keys, a); !ok {
			n += length(a)
		}
	}
	return n
}

// extent is the padded number of queries and of keys, multiples of 8.
func extent(sets []set) (queries, keys int) {
	for _, s := range sets {
		queries = max(queries, s.queries)
	}
	queries = (queries + 7) / 8 * 8
	for _, s := range sets {
		n := s.count
		if s.queries < queries {
			n++ // a padded key for the padded queries
		}
		keys = max(keys, n)
	}
	return queries, (keys + 7) / 8 * 8
}

func layOut(segments []engine.Segment, ancestors [][]int, sets []set, tokens int) grouping {
	g := grouping{groups: len(sets), querySlot: make([]int, tokens), keySlot: make([]int, tokens)}
	g.queries, g.keys = extent(sets)
	g.allowed = make([]bool, g.groups*g.queries*g.keys)
	places := make([][]int, tokens)
	for i, s := range sets {
		keys := make([]int, 0, g.keys)
		first := make(map[int]int, len(s.keys)) // key of a segment's first token
		for _, k := range s.keys {
			first[k] = len(keys)
			for t := segments[k].Start; t < segments[k].End; t++ {
				places[t] = append(places[t], len(g.key)+len(keys))
				keys = append(keys, t)
			}
		}
		real := len(keys)
		for len(keys) < g.keys {
			keys = append(keys, -1)
		}
		queries := make([]int, 0, g.queries)
		row := func() []bool {
			at := (i*g.queries + len(queries)) * g.keys
			return g.allowed[at : at+g.keys]
		}
		for _, o := range s.own {
			for t := segments[o].Start; t < segments[o].End; t++ {
				r := row()
				for _, a := range ancestors[o] {
					n := segments[a].End - segments[a].Start
					if a == o {
						n = t - segments[o].Start + 1
					}
					for k := range n {
						r[first[a]+k] = true
					}
				}
				g.querySlot[t] = len(g.query) + len(queries)
				g.keySlot[t] = len(g.key) + first[o] + t - segments[o].Start
				queries = append(queries, t)
			}
		}
		for len(queries) < g.queries {
			r := row()
			for k := real; k < g.keys; k++ {
				r[k] = true
			}
			queries = append(queries, -1)
		}
		g.key = append(g.key, keys...)
		g.query = append(g.query, queries...)
	}
	for t, p := range places {
		if len(p) > 1 {
			g.copied = append(g.copied, t)
			g.copies = append(g.copies, p)
		}
	}
	return g
}

// rows are the rows of a matrix of heads x tokens of which gathering makes [tokens, heads, groups]: for each group, head
// and slot, the row token*heads + head. Padding takes token 0's.
func rows(slots []int, groups, heads int) []int32 {
	n := len(slots) / groups
	out := make([]int32, 0, len(slots)*heads)
	for g := range groups {
		for h := range heads {
			for _, t := range slots[g*n : (g+1)*n] {
				out = append(out, int32(max(t, 0)*heads+h))
			}
		}
	}
	return out
}

// places are the rows of a gathered tensor of n slots per group that hold the given slots' values: for each slot and
// head, the row (group*heads + head)*n + slot in the group.
func places(slots []int, n, heads int) []int32 {
	out := make([]int32, 0, len(slots)*heads)
	for _, slot := range slots {
		for h := range heads {
			out = append(out, int32((slot/n*heads+h)*n+slot%n))
		}
	}
	return out
}
