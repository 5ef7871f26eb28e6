"""Where state lives: stores keep blobs, `sealed` turns them into payloads and back."""
