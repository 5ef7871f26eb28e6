/* What no server can beat: it never sleeps, and answers at once, without a TPM.
 *
 * spinning_server PATH: serves one client after the other on a Unix socket until it is killed. */
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char data[4096];
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);

    if (argc != 2 || strlen(argv[1]) >= sizeof address.sun_path)
        return 2;
    strcpy(address.sun_path, argv[1]);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4)) {
        perror(argv[1]);
        return 1;
    }
    for (;;) {
        int client = accept(listener, NULL, NULL);
        ssize_t size;
        while ((size = recv(client, data, sizeof data, MSG_DONTWAIT)) != 0) {
            if (size < 10)
                continue;
            memset(data + 2, 0, 8); /* the length, and TPM_RC_SUCCESS */
            data[4] = size >> 8, data[5] = size;
            if (send(client, data, size, MSG_NOSIGNAL) != size)
                break;
        }
        close(client);
    }
}
