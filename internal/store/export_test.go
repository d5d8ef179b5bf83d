package store

import "context"

// Exec runs a statement on the writer, for tests that need a state no method makes.
func (s *Store) Exec(ctx context.Context, statement string) error {
	_, err := s.writer.ExecContext(ctx, statement)
	return err
}
