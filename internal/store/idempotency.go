package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"
)

// Idempotency marks a request that makes an object and may be sent again.
type Idempotency struct {
	Key     string // names the request, among those of all senders
	Request string // a digest of what it asks for
}

// IdempotencyLifetime is how long a key is kept.
const IdempotencyLifetime = 24 * time.Hour

// ErrKeyReused is returned for a key that came before with a request for something else.
var ErrKeyReused = errors.New("the idempotency key belongs to another request")

type idempotencyField struct{}

// WithIdempotency makes the object that is created with the returned context known as that of i: AddFile, CreateUpload, AddPart,
// CompleteUpload, CreateJob and CreateBatch write the key in the transaction of the object. The caller has found with MadeBy that
// there is none, and lets no second request with the same key in meanwhile.
func WithIdempotency(ctx context.Context, i Idempotency) context.Context {
	return context.WithValue(ctx, idempotencyField{}, i)
}

// MadeBy returns the id of what an earlier request with the same key has made, "" if there was none, or ErrKeyReused.
func (s *Store) MadeBy(ctx context.Context, i Idempotency) (id string, err error) {
	var request string
	err = s.reader.QueryRowContext(ctx, `SELECT request, object_id FROM idempotency_keys WHERE key = ? AND expires_at > ?`, i.Key, s.now().Unix()).Scan(&request, &id)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return "", nil
	case err != nil:
		return "", fmt.Errorf("idempotency key: %w", err)
	case request != i.Request:
		return "", ErrKeyReused
	}
	return id, nil
}

// keep writes down that the context's request, if it has a key, has made the object with this id.
func (s *Store) keep(ctx context.Context, tx *sql.Tx, id string) error {
	i, ok := ctx.Value(idempotencyField{}).(Idempotency)
	if !ok {
		return nil
	}
	now := s.now()
	_, err := tx.ExecContext(ctx, `DELETE FROM idempotency_keys WHERE key = ? AND expires_at <= ?`, i.Key, now.Unix())
	if err == nil {
		_, err = tx.ExecContext(ctx, `INSERT INTO idempotency_keys (key, request, object_id, expires_at) VALUES (?, ?, ?, ?)`,
			i.Key, i.Request, id, now.Add(IdempotencyLifetime).Unix())
	}
	if err != nil {
		return fmt.Errorf("idempotency key: %w", err)
	}
	return nil
}

// expireKeys forgets the keys whose time is over.
func (s *Store) expireKeys(ctx context.Context) error {
	now := s.now().Unix()
	var late bool
	err := s.reader.QueryRowContext(ctx, `SELECT EXISTS (SELECT 1 FROM idempotency_keys WHERE expires_at <= ?)`, now).Scan(&late)
	if err == nil && late {
		err = s.write(ctx, func(tx *sql.Tx) error {
			_, err := tx.ExecContext(ctx, `DELETE FROM idempotency_keys WHERE expires_at <= ?`, now)
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("expired idempotency keys: %w", err)
	}
	return nil
}
