package app

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"github.com/hone-llm/hone/configs"
	"github.com/hone-llm/hone/server"
)

// keys are those of a valid configuration.
func keys(cfg *configs.Config) []server.Key {
	var all []server.Key
	if cfg.APIKey != "" {
		all = append(all, server.Key{Name: "HONE_API_KEY", Hash: sha256.Sum256([]byte(cfg.APIKey)), Scopes: configs.Scopes()})
	}
	for _, k := range cfg.Keys {
		key := server.Key{Name: k.Name, Scopes: k.Scopes}
		if n, err := hex.Decode(key.Hash[:], []byte(k.SHA256)); err != nil || n != len(key.Hash) {
			panic(fmt.Sprintf("the hash of the key %s, which the configuration let pass: %v", k.Name, err))
		}
		all = append(all, key)
	}
	return all
}
