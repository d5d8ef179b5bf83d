package store

// Exec runs a statement on the writer, for tests that need a state no method makes.
func (s *Store) Exec(statement string) error {
	_, err := s.writer.Exec(statement)
	return err
}
