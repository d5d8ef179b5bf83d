package prompt

import "context"

// Render is the rendering without tokenization, with or without the generation prompt.
func Render(b *Builder, ctx context.Context, chat Chat, generationPrompt bool) (string, error) {
	return b.render(ctx, chat, generationPrompt, nil)
}
