package runner

import (
	"cmp"
	"slices"
)

// A generated token costs a batch more than one of a prompt: about so many times. The weights of the Virtual Token
// Counter are the same (Sheng et al., Fairness in Serving Large Language Models, OSDI 2024).
const (
	promptCost    = 1
	generatedCost = 2
)

// client is whoever sent requests, for fair queueing: places go to the client that was served least, so that one with a
// hundred requests does not delay another's first.
type client struct {
	name    string
	served  float64 // cost of the tokens computed for it
	running int     // sequences
	waiting int
}

// clients are those that have sequences here, and some that had.
type clients struct {
	byName map[string]*client
	// floor is what the client that got the last place had been served: who was away does not come back with credit.
	floor float64
}

// maxAbsentClients is how many clients without sequences are remembered.
const maxAbsentClients = 1024

func (c *clients) get(name string) *client {
	if have := c.byName[name]; have != nil {
		if have.running+have.waiting == 0 {
			have.served = max(have.served, c.floor)
		}
		return have
	}
	if len(c.byName) > maxAbsentClients {
		for name, have := range c.byName {
			if have.running+have.waiting == 0 {
				delete(c.byName, name)
			}
		}
	}
	have := &client{name: name, served: c.floor}
	c.byName[name] = have
	return have
}

// unserved tells whether a client waits that has no running sequence.
func (c *clients) unserved() bool {
	for _, have := range c.byName {
		if have.waiting > 0 && have.running == 0 {
			return true
		}
	}
	return false
}

// turnTokens is how many generated tokens a client may be ahead of one that waits, where each has but one place.
const turnTokens = 256

// greediest returns the client that gives up a place to another's first sequence: the one with most running sequences,
// or, where none has two, the one that was served most, if that is a whole turn more than the other. nil: it has to wait.
func (c *clients) greediest(waiting *client) *client {
	var most *client
	for _, have := range c.byName {
		ahead := have.running == 1 && have.served-waiting.served > turnTokens*generatedCost
		if (have.running > 1 || ahead) && (most == nil ||
			cmp.Or(cmp.Compare(have.running, most.running), cmp.Compare(have.served, most.served), cmp.Compare(most.name, have.name)) > 0) {
			most = have
		}
	}
	return most
}

// turns yields waiting sequences in the order in which they may have a place: the next of the client served least, and
// of that client the one that came first. The background comes after all others. Branches
// go before all: what they belong to has a place.
func turns(waiting []*sequence) func(yield func(*sequence) bool) {
	return func(yield func(*sequence) bool) {
		var foreground, background []*sequence
		for _, q := range waiting {
			switch {
			case q.parent != nil:
				if !yield(q) {
					return
				}
			case q.request.background:
				background = append(background, q)
			default:
				foreground = append(foreground, q)
			}
		}
		_ = inTurn(foreground, yield) && inTurn(background, yield)
	}
}

// inTurn yields sequences, the next of the client served least; false if yield was.
func inTurn(waiting []*sequence, yield func(*sequence) bool) bool {
	queues := map[*client][]*sequence{}
	var order []*client
	for _, q := range waiting {
		c := q.request.client
		if queues[c] == nil {
			order = append(order, c)
		}
		queues[c] = append(queues[c], q)
	}
	for len(order) > 0 {
		// Again every time: who gets a place is charged for it.
		c := slices.MinFunc(order, func(a, b *client) int {
			return cmp.Or(cmp.Compare(a.served, b.served), cmp.Compare(queues[a][0].arrival, queues[b][0].arrival))
		})
		q := queues[c][0]
		if queues[c] = queues[c][1:]; len(queues[c]) == 0 {
			order = slices.DeleteFunc(order, func(o *client) bool { return o == c })
		}
		if !yield(q) {
			return false
		}
	}
	return true
}
