package store

import (
	"context"
	"fmt"
)

// JobTotals are sums over all jobs that there are.
type JobTotals struct {
	ByStatus      map[string]int
	Steps         int64 // optimizer steps with an event
	TrainedTokens int64
}

// JobTotals adds up the jobs' rows.
func (s *Store) JobTotals(ctx context.Context) (JobTotals, error) {
	totals := JobTotals{ByStatus: map[string]int{}}
	rows, err := s.reader.QueryContext(ctx, `SELECT status, count(*), sum(step), sum(trained_tokens) FROM jobs GROUP BY status`)
	if err != nil {
		return totals, fmt.Errorf("add up jobs: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var status string
		var n int
		var steps, tokens int64
		if err := rows.Scan(&status, &n, &steps, &tokens); err != nil {
			return totals, fmt.Errorf("add up jobs: %w", err)
		}
		totals.ByStatus[status] = n
		totals.Steps += steps
		totals.TrainedTokens += tokens
	}
	if err := rows.Err(); err != nil {
		return totals, fmt.Errorf("add up jobs: %w", err)
	}
	return totals, nil
}
