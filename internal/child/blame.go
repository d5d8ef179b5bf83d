package child

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"sync"
	"time"
)

// Limits of what is remembered of requests with which runners have ended.
const (
	maxEnds    = 3 // in a row, after which a request is refused
	maxBlamed  = 256
	blameLasts = 10 * time.Minute
)

// fingerprint is a digest of a request's content and its base model, whoever sends it.
type fingerprint [sha256.Size]byte

func fingerprintOf(base Base, content any) fingerprint {
	body, err := json.Marshal(content)
	if err != nil {
		return fingerprint{} // it cannot be sent either
	}
	return sha256.Sum256(append([]byte(base.Digest+"\n"), body...))
}

// blame counts, for each request, how often in a row the runner has ended while it ran. The zero value is empty.
type blame struct {
	mu      sync.Mutex
	entries map[fingerprint]blamed
}

type blamed struct {
	ends int
	at   time.Time // the last end
	how  error
}

func (b *blame) empty() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.entries) == 0
}

// look reports whether the runner has ended with the request as often as may be, and returns the refusal of one with which
// it has more often.
func (b *blame) look(key fingerprint) (suspected bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	entry, ok := b.entries[key]
	left := blameLasts - time.Since(entry.at)
	switch {
	case !ok:
		return false, nil
	case left <= 0:
		delete(b.entries, key)
		return false, nil
	case entry.ends < maxEnds:
		return entry.ends == maxEnds-1, nil
	}
	return true, &Error{Code: CodeEndsEngine, Message: fmt.Sprintf(
		"this request has ended the engine %d times in a row (the last time, %v) and is refused for the next %s. Change it; please report it, with the server's log",
		entry.ends, entry.how, max(left.Round(time.Minute), time.Minute))}
}

func (b *blame) add(key fingerprint, how error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.entries == nil {
		b.entries = map[fingerprint]blamed{}
	}
	entry := b.entries[key]
	if time.Since(entry.at) > blameLasts {
		entry.ends = 0
	}
	b.entries[key] = blamed{ends: entry.ends + 1, at: time.Now(), how: how}
	if len(b.entries) > maxBlamed {
		oldest := key
		for k, e := range b.entries {
			if e.at.Before(b.entries[oldest].at) {
				oldest = k
			}
		}
		delete(b.entries, oldest)
	}
}

func (b *blame) clear(key fingerprint) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.entries, key)
}
